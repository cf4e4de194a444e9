/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tracepoints of the slow path, below events/ploop in tracefs. docs/abi.md describes them.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM ploop

#if !defined(PLOOP_SYS_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define PLOOP_SYS_TRACE_H

#include <linux/tracepoint.h>

DECLARE_EVENT_CLASS(ploop_slot_class,
	TP_PROTO(u32 device, u32 cluster, u32 slot),
	TP_ARGS(device, cluster, slot),
	TP_STRUCT__entry(
		__field(u32, device)
		__field(u32, cluster)
		__field(u32, slot)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->cluster = cluster;
		__entry->slot = slot;
	),
	TP_printk("ploop%u cluster %u slot %u", __entry->device, __entry->cluster, __entry->slot)
);

/* A cluster was given a slot. */
DEFINE_EVENT(ploop_slot_class, ploop_map,
	TP_PROTO(u32 device, u32 cluster, u32 slot),
	TP_ARGS(device, cluster, slot)
);

/* A cluster lost its slot. */
DEFINE_EVENT(ploop_slot_class, ploop_unmap,
	TP_PROTO(u32 device, u32 cluster, u32 slot),
	TP_ARGS(device, cluster, slot)
);

/* What a write leaves out, or a cluster that is moved, was copied. */
TRACE_EVENT(ploop_copy,
	TP_PROTO(u32 device, u32 level, u32 from, u32 to, int result),
	TP_ARGS(device, level, from, to, result),
	TP_STRUCT__entry(
		__field(u32, device)
		__field(u32, level)
		__field(u32, from)
		__field(u32, to)
		__field(int, result)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->level = level;
		__entry->from = from;
		__entry->to = to;
		__entry->result = result;
	),
	TP_printk("ploop%u level %u slot %u to slot %u: %d", __entry->device, __entry->level,
		  __entry->from, __entry->to, __entry->result)
);

/* A commit has ended. */
TRACE_EVENT(ploop_commit,
	TP_PROTO(u32 device, int result),
	TP_ARGS(device, result),
	TP_STRUCT__entry(
		__field(u32, device)
		__field(int, result)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->result = result;
	),
	TP_printk("ploop%u: %d", __entry->device, __entry->result)
);

/* The image file of the top has grown, or could not. */
TRACE_EVENT(ploop_space,
	TP_PROTO(u32 device, u32 clusters, int result),
	TP_ARGS(device, clusters, result),
	TP_STRUCT__entry(
		__field(u32, device)
		__field(u32, clusters)
		__field(int, result)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->clusters = clusters;
		__entry->result = result;
	),
	TP_printk("ploop%u to %u clusters: %d", __entry->device, __entry->clusters,
		  __entry->result)
);

/* The queue takes no request from now on, or does so again. */
TRACE_EVENT(ploop_hold,
	TP_PROTO(u32 device, bool held),
	TP_ARGS(device, held),
	TP_STRUCT__entry(
		__field(u32, device)
		__field(bool, held)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->held = held;
	),
	TP_printk("ploop%u: %d", __entry->device, __entry->held)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
