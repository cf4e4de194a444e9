# SPDX-License-Identifier: GPL-2.0
# The only entry point, and no logic: every target calls a script in qemu/.

.DEFAULT_GOAL := all
.PHONY: all module tool check test soak bench bench-smoke bench-scaling bench-profile demo demo-migrate shell \
	install deb clean distclean help

all: ## the module and the tool, into .build/ (KDIR=DIR: for that kernel tree, with this machine's own tools)
	@qemu/build module tool

module: ## the module alone
	@qemu/build module

tool: ## the tool alone
	@qemu/build tool

check: ## formatting, lints, rules of the tree, host tests
	@qemu/check

test: ## check, then the guest tests and those of the packages (TESTS="NAME GLOB...": only those; DEBUG=1: guest tests on the debug kernel)
	@qemu/test

soak: ## test, with all that `test` does in part; hours (docs/testing.md)
	@qemu/test --soak

bench: ## measure against other drivers, exactly; renews docs/performance.md (an hour)
	@qemu/bench

bench-smoke: ## a few of its ratios against a baseline; a step of `test`, too
	@qemu/bench --smoke

bench-scaling: ## one job against two, on two CPUs
	@qemu/bench --scaling

bench-profile: ## instructions for each I/O, by function
	@qemu/bench --profile

demo: ## boot a guest and show what the driver is for
	@qemu/demo

demo-migrate: ## move a disk in use to another host, by rsync and by ploopctl copy
	@qemu/demo migrate

shell: ## an interactive guest with the module loaded
	@qemu/shell

install: ## module and tool into this system (DESTDIR=, PREFIX=, KVER=)
	@qemu/install

deb: ## Debian packages, into .build/deb/ (DEB_KERNELS="ABI...": modules for these; SIGN_KEY=, SIGN_CERT=)
	@qemu/deb

clean: ## remove .build/
	@qemu/clean

distclean: ## remove .build/ and the caches
	@qemu/clean all

help: ## this list
	@sed -n 's/^\([a-z-]*\): ## /\1\t/p' Makefile | expand -t 16
	@echo "KERNEL=ABI builds and tests against another Debian backports kernel, KERNEL=newest looks for a newer one."
