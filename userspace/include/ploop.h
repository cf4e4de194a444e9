/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * The ploop ABI for programs in C: ioctl numbers and the structures they carry, native endian.
 *
 * rust/pure/src/abi.rs is the authority and docs/abi.md says what each call does, which are
 * served so far, and what the errors mean; tests/host/tests/docs.rs compares this file with both.
 * Numbers 0 to 34 are OpenVZ's, directions included, which are not always those in which data
 * moves. Numbers from 0x80 on are of this driver.
 */
#ifndef PLOOP_H
#define PLOOP_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define PLOOP_MAJOR		182
#define PLOOP_MINORS		16
#define PLOOP_MINOR_SHIFT	4
#define PLOOP_DEVICES_MAX	65536
#define PLOOP_CONTROL_NAME	"ploop-control"
#define PLOOP_COOKIE_LEN_MAX	63

/*
 * A module whose interface is below PLOOP_INTERFACE_OLDEST is too old for a program that was built
 * with this header; one whose oldest is above PLOOP_INTERFACE is too new.
 */
#define PLOOP_INTERFACE		1
#define PLOOP_INTERFACE_OLDEST	1

/* ploop_ctl.format */
#define PLOOP_FORMAT_RAW	1
#define PLOOP_FORMAT_PLOOP1	2

/* ploop_ctl.flags */
#define PLOOP_FLAG_RDONLY	0x00000001
#define PLOOP_FLAG_COOKIE	0x00000004
#define PLOOP_FLAG_CLUBLKS	0x00000008
#define PLOOP_FLAG_FS_SYNC	0x10000000
#define PLOOP_FLAG_ACCEPT_INUSE	0x20000000

/* ploop_ctl_chunk.io */
#define PLOOP_IO_AUTO		0
#define PLOOP_IO_DIRECT		1
#define PLOOP_IO_NFS		2
#define PLOOP_IO_KAIO		4

/* Head of ADD_DELTA, SNAPSHOT, REPLACE_DELTA and GROW. */
struct ploop_ctl {
	__u32 format;		/* PLOOP_FORMAT_* */
	__u32 flags;		/* PLOOP_FLAG_* */
	__u32 cluster_log;	/* log2 of the sectors of a cluster */
	__u32 size;		/* GROW only */
	__u16 chunks;		/* ploop_ctl_chunk that follow */
	__u8 level;		/* REPLACE_DELTA only */
	__u8 mbz1;		/* 0 */
	__u32 mbz2;		/* 0 */
};

/* One image file. */
struct ploop_ctl_chunk {
	__s32 fd;		/* of the open image */
	__u32 io;		/* PLOOP_IO_* */
	__u32 flags;		/* 0 */
	__u32 offset;		/* 0 */
	__u64 start;		/* 0 */
	__u64 len;		/* 0 */
};

/* What ADD_DELTA reads; the cookie only with PLOOP_FLAG_COOKIE. */
struct ploop_add_delta {
	struct ploop_ctl ctl;
	struct ploop_ctl_chunk chunk;
	char cookie[64];	/* ends with a zero byte */
};

/* What GETDEVICE writes. */
struct ploop_getdevice_ctl {
	__u32 minor;		/* of the disk's node: 16 * index */
	__u32 mbz;		/* 0 */
};

/* Argument of CTL_ADD and CTL_REMOVE. */
struct ploop_device_arg {
	__u32 size;		/* of this structure: 32 */
	__u32 flags;		/* 0 */
	__s32 index;		/* N of ploopN; CTL_ADD takes -1 for any and puts the answer here */
	__u32 reserved[5];	/* 0 */
};

/* Argument of CTL_VERSION; all but size is 0, then out. */
struct ploop_version {
	__u32 size;		/* of this structure: 64 */
	__u32 flags;		/* 0 */
	__u32 interface;	/* PLOOP_INTERFACE of the module */
	__u32 oldest;		/* PLOOP_INTERFACE_OLDEST of the module */
	char name[32];		/* its version, ends with a zero byte */
	__u64 reserved[2];	/* 0 */
};

/* Argument of TRUNCATE. */
struct ploop_truncate_ctl {
	__s32 fd;		/* the same image, open for writing */
	__u32 alloc_head;	/* clusters to keep */
	__u8 level;
	__u8 mbz[7];
};

/* Head of UPDATE_INDEX's argument. */
struct ploop_index_update_ctl {
	__u32 n_maps;		/* how many struct reverse_map follow */
	__u8 level;
	__u8 mbz[3];
};

struct reverse_map {
	__u32 cluster;		/* guest cluster */
	__u32 slot;		/* its image cluster now */
};

/* Argument of BALLOON. */
struct ploop_balloon_ctl {
	__u32 mntn_type;	/* out: what runs, PLOOP_OP_* */
	__u32 alloc_head;	/* out: 0 */
	__u8 level;		/* out: of the top */
	__u8 inflate;
	__u8 keep_intact;
	__u8 mbz[5];
};

/* Head of DUMP_CACHED_BAT's argument; __u32 entries follow. */
struct ploop_dump_bat_ctl {
	__u32 level;
	__u32 start_cluster;
	__u32 nr_clusters;
};

/* An entry that a higher level hides. */
#define PLOOP_ENTRY_UNKNOWN	0xFFFFFFFFU

/* What a long operation is. */
#define PLOOP_OP_NONE		0
#define PLOOP_OP_MERGE		257
#define PLOOP_OP_GROW		258
#define PLOOP_OP_COMPACT	259

/* State of a long operation. */
#define PLOOP_OP_IDLE		0
#define PLOOP_OP_RUNNING	1

#define PLOOP_LEVEL_TOP		0xFFFFFFFFU

/* Argument of OP_START. */
struct ploop_op_start {
	__u32 size;		/* of this structure: 64 */
	__u32 flags;		/* 0 */
	__u32 op;		/* PLOOP_OP_MERGE, _GROW or _COMPACT */
	__u32 level;		/* merge: the upper level, PLOOP_LEVEL_TOP for the top; else 0 */
	__u64 sectors;		/* grow: the new size; else 0 */
	__u64 rate;		/* most bytes a second, 0: no limit */
	__u64 serial;		/* out: number of the operation on this device */
	__u64 reserved[3];	/* 0 */
};

/* Argument of OP_STATUS and OP_WAIT; all but the first two fields is out. */
struct ploop_op_status {
	__u32 size;		/* of this structure: 64 */
	__u32 flags;		/* 0 */
	__u32 op;		/* PLOOP_OP_* */
	__u32 state;		/* PLOOP_OP_IDLE or PLOOP_OP_RUNNING */
	__s32 result;		/* 0 or a negative errno */
	__u32 level;		/* as given to a merge */
	__u64 serial;
	__u64 done;		/* bytes */
	__u64 total;		/* bytes, as far as is known */
	__u64 rate;		/* bytes a second, 0: no limit */
	__u64 freed;		/* bytes by which the image file became shorter */
};

/* ploop_balloon_ctl.mntn_type: the write tracker runs. */
#define PLOOP_OP_TRACK		3

/* What TRACK_INIT and TRACK_READ return: bytes of the top's image file. */
struct ploop_track_extent {
	__u64 start;
	__u64 end;		/* one past the last byte */
};

/* ploop_checkpoint.flags: it starts with the next snapshot. */
#define PLOOP_CHECKPOINT_AT_SNAPSHOT	1

/* ploop_checkpoint.state */
#define PLOOP_CHECKPOINT_ARMED		0
#define PLOOP_CHECKPOINT_RECORDING	1

#define PLOOP_CHECKPOINTS_MAX	16

/* ploop_checkpoint.granularity, in bytes. */
#define PLOOP_GRANULARITY	0x10000
#define PLOOP_GRANULARITY_MIN	0x1000
#define PLOOP_GRANULARITY_MAX	0x4000000

/* Argument of CHECKPOINT_START, CHECKPOINT_DROP and CHECKPOINT_LIST. */
struct ploop_checkpoint {
	__u32 size;		/* of this structure: 64 */
	__u32 flags;		/* START: PLOOP_CHECKPOINT_AT_SNAPSHOT or 0 */
	__u8 id[16];		/* START, DROP: a UUID; LIST: out */
	__u32 granularity;	/* START: a power of two, 0: PLOOP_GRANULARITY; LIST: out */
	__u32 state;		/* LIST: out: PLOOP_CHECKPOINT_* */
	__u32 index;		/* LIST: which, from 0 */
	__u32 mbz;		/* 0 */
	__u64 dirty;		/* LIST: out: bytes written to since */
	__u64 disk;		/* LIST: out: bytes of the disk */
	__u64 reserved;		/* 0 */
};

/* Head of CHECKPOINT_READ's argument; room for nr ploop_extent follows. */
struct ploop_checkpoint_read {
	__u32 size;		/* of this structure: 64 */
	__u32 flags;		/* 0 */
	__u8 id[16];
	__u64 start;		/* first byte asked about; out: where the answer ends */
	__u64 len;		/* bytes; out: those not answered for */
	__u32 nr;		/* room; out: how many extents there are */
	__u32 mbz;		/* 0 */
	__u64 reserved[2];	/* 0 */
};

/* A part of the disk, in bytes. */
struct ploop_extent {
	__u64 start;
	__u64 len;
};

#define PLOOP_IO_NUMBER(dir, nr, size)	_IOC(dir, 'P', nr, size)

#define PLOOP_IOC_ADD_DELTA		_IOW('P', 0, struct ploop_ctl)
#define PLOOP_IOC_CLEAR			_IO('P', 1)
#define PLOOP_IOC_STOP			_IO('P', 2)
#define PLOOP_IOC_START			_IO('P', 3)
#define PLOOP_IOC_SNAPSHOT		_IOW('P', 4, struct ploop_ctl)
#define PLOOP_IOC_DEL_DELTA		_IOW('P', 5, __u32)
#define PLOOP_IOC_TRACK_INIT		_IOR('P', 6, struct ploop_track_extent)
#define PLOOP_IOC_TRACK_STOP		_IO('P', 7)
#define PLOOP_IOC_TRACK_ABORT		_IO('P', 8)
#define PLOOP_IOC_TRACK_SETPOS		_IOW('P', 9, __u64)
#define PLOOP_IOC_TRACK_READ		_IOR('P', 10, struct ploop_track_extent)
#define PLOOP_IOC_SYNC			_IO('P', 11)
#define PLOOP_IOC_MERGE			_IO('P', 12)
#define PLOOP_IOC_REPLACE_DELTA		_IOW('P', 13, struct ploop_ctl)
#define PLOOP_IOC_TRUNCATE		PLOOP_IO_NUMBER(_IOC_WRITE, 14, 16)
#define PLOOP_IOC_UPDATE_INDEX		PLOOP_IO_NUMBER(_IOC_WRITE, 16, 8)
#define PLOOP_IOC_GROW			_IOW('P', 17, struct ploop_ctl)
#define PLOOP_IOC_FBGET			PLOOP_IO_NUMBER(_IOC_WRITE, 18, 16)
#define PLOOP_IOC_BALLOON		PLOOP_IO_NUMBER(_IOC_WRITE, 19, 16)
#define PLOOP_IOC_FREEBLKS		PLOOP_IO_NUMBER(_IOC_WRITE, 20, 16)
#define PLOOP_IOC_RELOCBLKS		PLOOP_IO_NUMBER(_IOC_WRITE, 21, 16)
#define PLOOP_IOC_GETDEVICE		_IOW('P', 22, struct ploop_getdevice_ctl)
#define PLOOP_IOC_DISCARD_INIT		_IO('P', 23)
#define PLOOP_IOC_DISCARD_FINI		_IO('P', 24)
#define PLOOP_IOC_DISCARD_WAIT		_IO('P', 25)
#define PLOOP_IOC_FBDROP		_IO('P', 26)
#define PLOOP_IOC_FBFILTER		PLOOP_IO_NUMBER(_IOC_READ, 27, 8)
#define PLOOP_IOC_MAX_DELTA_SIZE	_IOW('P', 28, __u64)
#define PLOOP_IOC_PUSH_BACKUP_INIT	PLOOP_IO_NUMBER(_IOC_READ, 29, 24)
#define PLOOP_IOC_PUSH_BACKUP_IO	PLOOP_IO_NUMBER(_IOC_READ, 30, 24)
#define PLOOP_IOC_PUSH_BACKUP_STOP	PLOOP_IO_NUMBER(_IOC_READ, 31, 24)
#define PLOOP_IOC_FREEZE		_IO('P', 32)
#define PLOOP_IOC_THAW			_IO('P', 33)
#define PLOOP_IOC_DUMP_CACHED_BAT	PLOOP_IO_NUMBER(_IOC_WRITE, 34, 16)

/* On /dev/ploop-control. */
#define PLOOP_IOC_CTL_ADD		_IOWR('P', 0x80, struct ploop_device_arg)
#define PLOOP_IOC_CTL_REMOVE		_IOW('P', 0x81, struct ploop_device_arg)

#define PLOOP_IOC_CTL_VERSION		_IOWR('P', 0x8B, struct ploop_version)

/* Long operations; on the disk. */
#define PLOOP_IOC_OP_START		_IOWR('P', 0x82, struct ploop_op_start)
#define PLOOP_IOC_OP_STATUS		_IOWR('P', 0x83, struct ploop_op_status)
#define PLOOP_IOC_OP_WAIT		_IOWR('P', 0x84, struct ploop_op_status)
#define PLOOP_IOC_OP_CANCEL		_IO('P', 0x85)
#define PLOOP_IOC_OP_RATE		_IOW('P', 0x86, __u64)

/* Checkpoints; on the disk. */
#define PLOOP_IOC_CHECKPOINT_START	_IOW('P', 0x87, struct ploop_checkpoint)
#define PLOOP_IOC_CHECKPOINT_DROP	_IOW('P', 0x88, struct ploop_checkpoint)
#define PLOOP_IOC_CHECKPOINT_LIST	_IOWR('P', 0x89, struct ploop_checkpoint)
#define PLOOP_IOC_CHECKPOINT_READ	_IOWR('P', 0x8A, struct ploop_checkpoint_read)

#endif
