// SPDX-License-Identifier: GPL-2.0
/*
 * QEMU plugin: how many guest instructions ran, by the address of their
 * translation block. For one CPU. Options: fifo=PATH, a FIFO from which lines
 * are read; for each, the counts so far are written to the file it names, as
 * "ADDRESS COUNT" in hexadecimal and decimal. The file appears when complete.
 *
 * Debian ships QEMU with plugins but without qemu-plugin.h: what is used of it
 * is declared here, as of version 4 of that interface.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

struct qemu_plugin_tb;
struct qemu_plugin_scoreboard;
typedef struct {
	struct qemu_plugin_scoreboard *score;
	size_t offset;
} qemu_plugin_u64;
enum { QEMU_PLUGIN_INLINE_ADD_U64 };
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id,
	void (*cb)(uint64_t id, struct qemu_plugin_tb *tb));
void qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(struct qemu_plugin_tb *tb,
	int op, qemu_plugin_u64 entry, uint64_t imm);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
struct qemu_plugin_scoreboard *qemu_plugin_scoreboard_new(size_t element_size);
void *qemu_plugin_scoreboard_find(struct qemu_plugin_scoreboard *score,
	unsigned int vcpu_index);

EXPORT int qemu_plugin_version = 4;

/* Blocks that can be told apart; a block translated again is another one. */
#define NR_BLOCKS (4u << 20)

static uint64_t addresses[NR_BLOCKS];
/* Grown by the CPU's thread alone; the last one takes all that have no room. */
static unsigned int nr_blocks;
static struct qemu_plugin_scoreboard *counts;
static char fifo[4096];

static void translated(uint64_t id, struct qemu_plugin_tb *tb)
{
	unsigned int nr = nr_blocks;
	qemu_plugin_u64 entry = { counts, nr * sizeof(uint64_t) };

	(void)id;
	addresses[nr] = nr < NR_BLOCKS - 1 ? qemu_plugin_tb_vaddr(tb) : 0;
	if (nr < NR_BLOCKS - 1)
		nr_blocks++;
	qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(tb,
		QEMU_PLUGIN_INLINE_ADD_U64, entry, qemu_plugin_tb_n_insns(tb));
}

static void dump(const char *path)
{
	const uint64_t *count = qemu_plugin_scoreboard_find(counts, 0);
	char new[sizeof(fifo) + 4];
	FILE *file;

	snprintf(new, sizeof(new), "%s.new", path);
	file = fopen(new, "w");
	if (!file)
		return;
	for (unsigned int nr = 0; nr <= nr_blocks; nr++)
		if (count[nr])
			fprintf(file, "%" PRIx64 " %" PRIu64 "\n", addresses[nr], count[nr]);
	if (fclose(file) == 0)
		rename(new, path);
}

static void *listen(void *unused)
{
	char line[sizeof(fifo)];
	/* For writing, too: so it never ends. */
	FILE *file = fopen(fifo, "r+");

	(void)unused;
	while (file && fgets(line, sizeof(line), file)) {
		line[strcspn(line, "\n")] = '\0';
		dump(line);
	}
	return NULL;
}

EXPORT int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
	pthread_t thread;

	(void)info;
	if (argc != 1 || strncmp(argv[0], "fifo=", 5) != 0)
		return -1;
	snprintf(fifo, sizeof(fifo), "%s", argv[0] + 5);
	counts = qemu_plugin_scoreboard_new(NR_BLOCKS * sizeof(uint64_t));
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return pthread_create(&thread, NULL, listen, NULL);
}
