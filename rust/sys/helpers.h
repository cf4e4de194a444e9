/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What Rust cannot reach by itself: static inlines, macros and module parameters of the kernel.
 * Each function here does one kernel call; none decides anything.
 */
#ifndef PLOOP_SYS_HELPERS_H
#define PLOOP_SYS_HELPERS_H

#include <crypto/md5.h>
#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/bio.h>
#include <linux/cgroup.h>
#include <linux/falloc.h>
#include <linux/file.h>
#include <linux/filelock.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/miscdevice.h>
#include <linux/proc_fs.h>
#include <linux/stat.h>
#include <linux/sysfs.h>
#include <linux/uio.h>
#include <linux/workqueue.h>

/* Casts through __force hide these macros from bindgen; give them a type. */
static const blk_features_t PLOOP_CONST_BLK_FEAT_WRITE_CACHE = BLK_FEAT_WRITE_CACHE;
static const blk_features_t PLOOP_CONST_BLK_FEAT_FUA = BLK_FEAT_FUA;
static const blk_features_t PLOOP_CONST_BLK_FEAT_IO_STAT = BLK_FEAT_IO_STAT;
static const blk_features_t PLOOP_CONST_BLK_FEAT_NOWAIT = BLK_FEAT_NOWAIT;
static const blk_opf_t PLOOP_CONST_REQ_OP_MASK = REQ_OP_MASK;
static const blk_opf_t PLOOP_CONST_REQ_FUA = REQ_FUA;
static const blk_opf_t PLOOP_CONST_REQ_SWAP = REQ_SWAP;
static const blk_opf_t PLOOP_CONST_REQ_NOUNMAP = REQ_NOUNMAP;
static const blk_opf_t PLOOP_CONST_REQ_PREFLUSH = REQ_PREFLUSH;
static const blk_opf_t PLOOP_CONST_REQ_NOWAIT = REQ_NOWAIT;
static const blk_opf_t PLOOP_CONST_REQ_POLLED = REQ_POLLED;
static const blk_opf_t PLOOP_CONST_REQ_ALLOC_CACHE = REQ_ALLOC_CACHE;
static const blk_status_t PLOOP_CONST_BLK_STS_IOERR = BLK_STS_IOERR;
static const blk_status_t PLOOP_CONST_BLK_STS_AGAIN = BLK_STS_AGAIN;
static const int PLOOP_CONST_IOCB_DIRECT = IOCB_DIRECT;
static const int PLOOP_CONST_IOCB_DSYNC = IOCB_DSYNC;
static const int PLOOP_CONST_IOCB_WRITE = IOCB_WRITE;
static const unsigned int PLOOP_CONST_FMODE_CAN_ODIRECT = (__force unsigned int)FMODE_CAN_ODIRECT;
static const unsigned int PLOOP_CONST_FMODE_WRITE = (__force unsigned int)FMODE_WRITE;
static const unsigned int PLOOP_CONST_FMODE_READ = (__force unsigned int)FMODE_READ;

/* State of a worker that does I/O for a request; see ploop_io_enter(). */
struct ploop_io_scope {
	unsigned int flags;
	bool in_blkcg;
	struct cgroup_subsys_state *memcg_css;
	struct mem_cgroup *old_memcg;
};

void ploop_io_enter(struct ploop_io_scope *scope, struct bio *bio);
void ploop_io_leave(struct ploop_io_scope *scope);

/* Who a file is, as stat(2) says. */
struct ploop_file_id {
	u64 ino;
	u32 dev_major;
	u32 dev_minor;
};

int ploop_file_identify(struct file *file, struct ploop_file_id *id);

/* What direct I/O needs, in bytes; both 0 where it cannot be done. */
struct ploop_dio_align {
	unsigned int offset;
	unsigned int memory;
};

void ploop_file_dio_align(struct file *file, struct ploop_dio_align *align);
loff_t ploop_file_size(struct file *file);
loff_t ploop_file_size_cached(struct file *file);
umode_t ploop_file_mode(struct file *file);
struct inode *ploop_file_host(struct file *file);
bool ploop_file_is_rdonly_fs(struct file *file);
void ploop_queue_lock_classes(struct request_queue *q);
void ploop_get_file(struct file *file);
void ploop_kiocb_start_write(struct kiocb *iocb);
void ploop_kiocb_end_write(struct kiocb *iocb);
int ploop_file_truncate(struct file *file, loff_t len);
struct block_device *ploop_file_bdev(struct file *file);
bool ploop_file_is_on(struct file *file, struct gendisk *disk);
int ploop_file_deny_writers(struct file *file);
void ploop_file_allow_writers(struct file *file);
int ploop_file_bmap(struct file *file, u64 pos, u64 *sector);
bool ploop_file_is_cached(struct file *file, u64 pos, u64 len);
const void *ploop_file_treatment(struct file *file);
bool ploop_file_begin_bios(struct file *file, const void *treatment, u64 pos, u64 len, bool is_write);
int ploop_file_uncache(struct file *file, u64 pos, u64 len);
void ploop_file_was_written(struct file *file);
void ploop_file_end_write(struct file *file);
bool ploop_has_stack(void);
bool ploop_plug_has_others(struct request_queue *q);
void ploop_submit_bios(struct bio *bio);
bool ploop_in_task(void);
int ploop_ofd_read_lock(struct file *file, loff_t start);
void ploop_ofd_unlock(struct file *file, loff_t start);
bool ploop_ofd_is_locked(struct file *file, loff_t start, pid_t *pid);

void ploop_errand(struct workqueue_struct *wq, void (*run)(void *arg), void *arg);
bool ploop_is_mortal(void);
void ploop_freeze_prepare(struct request_queue *q);
void ploop_freeze_ended(struct request_queue *q);
unsigned int ploop_no_reclaim_begin(void);
void ploop_no_reclaim_end(unsigned int flags);
unsigned int ploop_freeze_start(struct request_queue *q);
bool ploop_freeze_wait(struct request_queue *q, unsigned int ms);
void ploop_unfreeze_queue(struct request_queue *q, unsigned int flags);
void ploop_wait_dispatched(struct blk_mq_tag_set *set);
int ploop_set_limits(struct gendisk *disk, struct queue_limits *lim);
unsigned int ploop_disk_openers(struct gendisk *disk);
void ploop_disk_open_lock(struct gendisk *disk);
void ploop_disk_open_unlock(struct gendisk *disk);
bool ploop_bdev_is_partition(struct block_device *bdev);
struct gendisk *ploop_kobj_to_disk(struct kobject *kobj);
void *ploop_lock_classes_new(void);
void ploop_lock_classes_free(void *data);
int ploop_init_hctx(struct blk_mq_hw_ctx *hctx, void *data, unsigned int idx);
struct page *ploop_virt_to_page(void *addr);
void ploop_page_get(void *addr);

void ploop_trace_map(u32 device, u32 cluster, u32 slot);
void ploop_trace_unmap(u32 device, u32 cluster, u32 slot);
void ploop_trace_copy(u32 device, u32 level, u32 from, u32 to, int result);
void ploop_trace_commit(u32 device, int result);
void ploop_trace_space(u32 device, u32 clusters, int result);

struct srcu_struct *ploop_epoch_new(void);
void ploop_epoch_free(struct srcu_struct *ssp);
int ploop_epoch_enter(struct srcu_struct *ssp);
void ploop_epoch_leave(struct srcu_struct *ssp, int idx);
void ploop_epoch_wait(struct srcu_struct *ssp);

/* Disk and partitions, as many as a disk can have. */
#define PLOOP_PARTITIONS DISK_MAX_PARTS

/* Block devices whose file systems are frozen, each open. */
struct ploop_frozen_fs {
	unsigned int nr;
	struct file *files[PLOOP_PARTITIONS];
};

int ploop_fs_freeze(struct gendisk *disk, struct ploop_frozen_fs *fs);
void ploop_fs_thaw(struct ploop_frozen_fs *fs);
bool ploop_rq_is_zero(struct request *rq);
u64 ploop_file_space(struct file *file);
void ploop_disk_event(struct gendisk *disk, char **env);
void ploop_get_disk(struct gendisk *disk);
void ploop_put_disk(struct gendisk *disk);

struct file *ploop_reopen(struct file *file, int flags);
void ploop_init_delayed_work(struct delayed_work *work, work_func_t fn,
			     struct lock_class_key *key);
unsigned long ploop_msecs_to_jiffies(unsigned int ms);
unsigned long ploop_totalram_bytes(void);
unsigned int ploop_map_limit_mb(void);
bool ploop_wants_bdev(void);
bool ploop_fatal_signal_pending(void);
bool ploop_compat_proc(void);
void ploop_sleep_ms(unsigned int ms);
bool ploop_sleep_killable_ms(unsigned int ms);
void ploop_wait_for_leavers(void);
void *ploop_pde_data(struct inode *inode);

#endif
