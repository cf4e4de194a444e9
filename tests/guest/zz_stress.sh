#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# stress
# timeout: 900
SEEDS="21 22 23 24" OPS=2500
. "$(dirname "$0")/model.sh"
