// SPDX-License-Identifier: GPL-2.0
/*
 * One kernel call a function; see helpers.h. The module parameters are here because the Rust
 * macro cannot show parameters in sysfs, and libploop reads three of them there.
 */
#include <linux/blk-cgroup.h>
#include <linux/cred.h>
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task_stack.h>
#include <linux/srcu.h>
#include <linux/statfs.h>
#include "helpers.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

static bool large_disk_support = true;
module_param(large_disk_support, bool, 0444);
MODULE_PARM_DESC(large_disk_support, "Marker for libploop: ploop1 version 2 images are known");

static bool native_discard_support = true;
module_param(native_discard_support, bool, 0444);
MODULE_PARM_DESC(native_discard_support, "Marker for libploop: discard is handled by the driver");

static bool kaio_backed_ext4;
module_param(kaio_backed_ext4, bool, 0444);
MODULE_PARM_DESC(kaio_backed_ext4, "Marker for libploop: unused");

static unsigned int map_limit_mb;
module_param(map_limit_mb, uint, 0644);
MODULE_PARM_DESC(map_limit_mb, "Most memory for the maps of one device in MiB; 0: 1/16 of RAM");

static bool bdev;
module_param(bdev, bool, 0644);
MODULE_PARM_DESC(bdev, "Send I/O straight to the device below an image's file system where that is safe");

static bool compat_proc;
module_param(compat_proc, bool, 0444);
MODULE_PARM_DESC(compat_proc, "Make /proc/vz/ploop_minor for libploop (systemd may then take this host for a container)");

MODULE_ALIAS_BLOCKDEV_MAJOR(182);

unsigned int ploop_map_limit_mb(void)
{
	return READ_ONCE(map_limit_mb);
}

bool ploop_wants_bdev(void)
{
	return READ_ONCE(bdev);
}

bool ploop_compat_proc(void)
{
	return compat_proc;
}

void *ploop_pde_data(struct inode *inode)
{
	return pde_data(inode);
}

unsigned long ploop_totalram_bytes(void)
{
	return totalram_pages() << PAGE_SHIFT;
}

#define PLOOP_IO_FLAGS (PF_LOCAL_THROTTLE | PF_MEMALLOC_NOIO)

/*
 * A page that is swapped gets nothing from the kernel's reserves: file systems may not ask for memory
 * without fail then, and bios have none there.
 */
void ploop_io_enter(struct ploop_io_scope *scope, struct bio *bio)
{
	struct cgroup_subsys_state *css = NULL;

	scope->flags = current->flags & PLOOP_IO_FLAGS;
	current->flags |= PF_LOCAL_THROTTLE | PF_MEMALLOC_NOIO;
	scope->memcg_css = NULL;
	scope->old_memcg = NULL;
#ifdef CONFIG_BLK_CGROUP
	if (bio)
		css = bio_blkcg_css(bio);
	if (css == blkcg_root_css)
		css = NULL;
	if (css) {
		kthread_associate_blkcg(css);
#ifdef CONFIG_MEMCG
		scope->memcg_css = cgroup_get_e_css(css->cgroup, &memory_cgrp_subsys);
		if (scope->memcg_css)
			scope->old_memcg = set_active_memcg(mem_cgroup_from_css(scope->memcg_css));
#endif
	}
#endif
	scope->in_blkcg = css;
}

void ploop_io_leave(struct ploop_io_scope *scope)
{
	if (scope->in_blkcg)
		kthread_associate_blkcg(NULL);
	if (scope->memcg_css) {
		set_active_memcg(scope->old_memcg);
		css_put(scope->memcg_css);
	}
	current->flags &= ~PLOOP_IO_FLAGS;
	current->flags |= scope->flags;
}

int ploop_file_identify(struct file *file, struct ploop_file_id *id)
{
	struct kstat stat;
	int ret = vfs_getattr_nosec(&file->f_path, &stat, STATX_INO, 0);

	if (ret)
		return ret;
	id->ino = stat.ino;
	id->dev_major = MAJOR(stat.dev);
	id->dev_minor = MINOR(stat.dev);
	return 0;
}

/*
 * What the file cannot do without. The granularity that a file system likes best is not asked for:
 * it changes with what was done to the file (a reflink on XFS) and with the file system that the
 * image is moved to, and the block size of a disk must not. Where a direct write is finer than
 * that, the file system goes through its page cache by itself.
 */
void ploop_file_dio_align(struct file *file, struct ploop_dio_align *align)
{
	struct block_device *bdev = file_inode(file)->i_sb->s_bdev;
	u32 mask = STATX_DIOALIGN | STATX_DIO_READ_ALIGN;
	struct kstat stat;

	align->offset = SECTOR_SIZE;
	align->memory = SECTOR_SIZE;
	if (S_ISBLK(file_inode(file)->i_mode)) {
		bdev = I_BDEV(file->f_mapping->host);
	} else if (!vfs_getattr_nosec(&file->f_path, &stat, mask, 0) &&
		   (stat.result_mask & STATX_DIOALIGN)) {
		if (!stat.dio_offset_align) {
			align->offset = 0;
			align->memory = 0;
			return;
		}
		if (stat.dio_mem_align > align->memory)
			align->memory = stat.dio_mem_align;
		if ((stat.result_mask & STATX_DIO_READ_ALIGN) && stat.dio_read_offset_align) {
			align->offset = stat.dio_read_offset_align;
			return;
		}
	}
	if (bdev) {
		align->offset = bdev_logical_block_size(bdev);
		align->memory = max(align->memory, bdev_dma_alignment(bdev) + 1);
	}
}

struct file *ploop_reopen(struct file *file, int flags)
{
	return dentry_open(&file->f_path, flags, current_cred());
}

loff_t ploop_file_size(struct file *file)
{
	struct kstat stat;
	int ret;

	if (S_ISBLK(file_inode(file)->i_mode))
		return i_size_read(file->f_mapping->host);
	/* Asks the server on network file systems. */
	ret = vfs_getattr_nosec(&file->f_path, &stat, STATX_SIZE, 0);
	return ret ? ret : stat.size;
}

/* As the VFS knows it, without asking the file system. */
loff_t ploop_file_size_cached(struct file *file)
{
	return i_size_read(file->f_mapping->host);
}

umode_t ploop_file_mode(struct file *file)
{
	return file_inode(file)->i_mode;
}

struct inode *ploop_file_host(struct file *file)
{
	if (S_ISBLK(file_inode(file)->i_mode))
		return file->f_mapping->host;
	/* Below overlayfs, if it comes to that. */
	return d_real_inode(file->f_path.dentry);
}

/* Whether the file is on the disk, or is it or a partition of it. */
bool ploop_file_is_on(struct file *file, struct gendisk *disk)
{
	struct block_device *bdev;

	if (S_ISBLK(file_inode(file)->i_mode))
		bdev = file_bdev(file);
	else
		bdev = ploop_file_host(file)->i_sb->s_bdev;
	return bdev && bdev->bd_disk == disk;
}

bool ploop_file_is_rdonly_fs(struct file *file)
{
	return sb_rdonly(file_inode(file)->i_sb);
}

int ploop_file_truncate(struct file *file, loff_t len)
{
	struct dentry *dentry = file->f_path.dentry;
	struct iattr attr = {
		.ia_valid = ATTR_SIZE | ATTR_FILE,
		.ia_size = len,
		.ia_file = file,
	};
	int ret;

	if (!S_ISREG(d_inode(dentry)->i_mode))
		return -EINVAL;
	if (IS_APPEND(d_inode(dentry)))
		return -EPERM;
	/*
	 * As ftruncate(). Not vfs_truncate(): that asks for write access, which we may have denied to
	 * all others.
	 */
	sb_start_write(file_inode(file)->i_sb);
	/* Who is killed meanwhile may be in the middle of what has to be finished. */
	inode_lock(d_inode(dentry));
	ret = notify_change(file_mnt_idmap(file), dentry, &attr, NULL);
	inode_unlock(d_inode(dentry));
	sb_end_write(file_inode(file)->i_sb);
	return ret;
}

/* What keeps bios from a file's blocks. Verity can be enabled while writers are denied. */
#define PLOOP_NOT_STRAIGHT (S_DAX | S_ENCRYPTED | S_VERITY | S_SWAPFILE)

/*
 * The device that has the file's blocks, if bios may go there: on a file system that changes where
 * the blocks of a file are only for who has the file open for writing. That is ext4. Other blocks
 * than of 4 KiB are not worth it: smaller ones would have to be looked up one by one, and of larger
 * ones the page cache would write back what is around the zeros of a punched part.
 */
struct block_device *ploop_file_bdev(struct file *file)
{
	struct inode *inode = file_inode(file);
	struct super_block *sb = inode->i_sb;

	if (!S_ISREG(inode->i_mode) || !sb->s_bdev || strcmp(sb->s_type->name, "ext4"))
		return NULL;
	if ((inode->i_flags & PLOOP_NOT_STRAIGHT) || inode->i_blkbits != 12)
		return NULL;
	/* It would see memory change that it has a checksum of. */
	if (bdev_stable_writes(sb->s_bdev))
		return NULL;
	return sb->s_bdev;
}

/*
 * From here on nobody can open the file for writing, as if it was being executed. Our own write
 * access is exchanged for that at once, if nobody else has any; open(2) for writing, truncate(2),
 * and all that needs a file open for writing, fail with ETXTBSY.
 */
int ploop_file_deny_writers(struct file *file)
{
	struct inode *inode = file_inode(file);
	int ret;

	if (!(file->f_mode & FMODE_WRITE))
		ret = deny_write_access(file);
	else
		ret = atomic_cmpxchg(&inode->i_writecount, 1, -1) == 1 ? 0 : -ETXTBSY;
	if (ret)
		return ret;
	/* What somebody wrote to the page cache before. */
	ret = filemap_write_and_wait_range(file->f_mapping, 0, LLONG_MAX);
	if (ret)
		ploop_file_allow_writers(file);
	return ret;
}

void ploop_file_allow_writers(struct file *file)
{
	if (file->f_mode & FMODE_WRITE)
		atomic_add(2, &file_inode(file)->i_writecount);
	else
		allow_write_access(file);
}

/*
 * The device's sector of a block of the file; 0 if it is not there, or if it was not written yet. Of
 * a file of ploop_file_bdev().
 */
int ploop_file_bmap(struct file *file, u64 pos, u64 *sector)
{
	struct inode *inode = file_inode(file);
	sector_t block = pos >> inode->i_blkbits;
	int ret = bmap(inode, &block);

	*sector = block << (inode->i_blkbits - SECTOR_SHIFT);
	return ret;
}

/* Whether the page cache has a part of what is on these bytes. */
bool ploop_file_is_cached(struct file *file, u64 pos, u64 len)
{
	struct address_space *mapping = file->f_mapping;

	return READ_ONCE(mapping->nrpages) && filemap_range_has_page(mapping, pos, pos + len - 1);
}

/* How its file system treats the file's data: it changes when the data begins to be journalled. */
const void *ploop_file_treatment(struct file *file)
{
	return READ_ONCE(file->f_mapping->a_ops);
}

/*
 * Whether bios may be sent to these blocks, which are where they were looked up. A write then holds
 * off a freeze of the file system until ploop_file_end_write().
 */
bool ploop_file_begin_bios(struct file *file, const void *treatment, u64 pos, u64 len, bool is_write)
{
	struct address_space *mapping = file->f_mapping;
	struct inode *inode = file_inode(file);
	struct super_block *sb = inode->i_sb;

	if (ploop_file_treatment(file) != treatment || (inode->i_flags & PLOOP_NOT_STRAIGHT))
		return false;
	/* What a write through the file has left in the page cache. */
	if (mapping_tagged(mapping, PAGECACHE_TAG_DIRTY) ||
	    mapping_tagged(mapping, PAGECACHE_TAG_WRITEBACK))
		return false;
	if (!is_write)
		return true;
	if (sb_rdonly(sb) || ploop_file_is_cached(file, pos, len))
		return false;
	if (!sb_start_write_trylock(sb))
		return false;
	/* Ended by another context. */
	__sb_writers_release(sb, SB_FREEZE_WRITE);
	return true;
}

int ploop_file_uncache(struct file *file, u64 pos, u64 len)
{
	return invalidate_inode_pages2_range(file->f_mapping, pos >> PAGE_SHIFT,
					     (pos + len - 1) >> PAGE_SHIFT);
}

/* The file's blocks were written behind the back of its file system. */
void ploop_file_was_written(struct file *file)
{
	struct super_block *sb = file_inode(file)->i_sb;

	/* It is only a time: not worth waiting for a thaw. */
	if (!sb_start_write_trylock(sb))
		return;
	(void)file_update_time(file);
	sb_end_write(sb);
}

void ploop_file_end_write(struct file *file)
{
	struct super_block *sb = file_inode(file)->i_sb;

	__sb_writers_acquired(sb, SB_FREEZE_WRITE);
	sb_end_write(sb);
}

bool ploop_in_task(void)
{
	return in_task();
}

/*
 * Whether half of the stack is left: disks on disks on disks submit bios one inside of the other.
 */
bool ploop_has_stack(void)
{
	unsigned long left = current_stack_pointer - (unsigned long)end_of_stack(current);

	return left > THREAD_SIZE / 2;
}

/*
 * Whether a request of another queue than q waits in the caller's plug, which may be the one that is
 * being flushed: its tag comes free only after we have returned, and we may have to wait for one of
 * that queue. All of what is cached in a plug is of one queue; so is what waits, but for
 * multiple_queues.
 */
bool ploop_plug_has_others(struct request_queue *q)
{
	struct blk_plug *plug = current->plug;
	struct request *rq;

	if (!plug)
		return false;
	rq = rq_list_peek(&plug->mq_list);
	if (rq && (plug->multiple_queues || rq->q != q))
		return true;
	rq = rq_list_peek(&plug->cached_rqs);
	return rq && rq->q != q;
}

/*
 * Submits a list of bios, which are then on their way. Not by way of the caller's plug, which may be
 * the one whose requests are being issued right now; nor of its list of bios: who is in
 * submit_bio() may run requests of others while it waits for a tag, which may be one of theirs.
 */
void ploop_submit_bios(struct bio *bio)
{
	struct bio_list *list = current->bio_list;
	struct blk_plug *plug = current->plug;

	current->bio_list = NULL;
	/* Else the scheduler looks for the time that the plug keeps. */
	blk_plug_invalidate_ts();
	current->plug = NULL;
	while (bio) {
		struct bio *next = bio->bi_next;

		bio->bi_next = NULL;
		if ((bio->bi_opf & REQ_NOWAIT) && !bdev_nowait(bio->bi_bdev))
			bio->bi_opf &= ~REQ_NOWAIT;
		submit_bio_noacct(bio);
		bio = next;
	}
	current->plug = plug;
	current->bio_list = list;
}

void ploop_get_file(struct file *file)
{
	get_file(file);
}

void ploop_kiocb_start_write(struct kiocb *iocb)
{
	kiocb_start_write(iocb);
}

void ploop_kiocb_end_write(struct kiocb *iocb)
{
	kiocb_end_write(iocb);
}

static void ploop_ofd_init(struct file_lock *fl, struct file *file, loff_t start, int type)
{
	locks_init_lock(fl);
	fl->c.flc_flags = FL_POSIX | FL_OFDLCK;
	fl->c.flc_type = type;
	fl->c.flc_owner = file;
	fl->c.flc_pid = -1;
	fl->c.flc_file = file;
	fl->fl_start = start;
	fl->fl_end = start;
}

/* Locks one byte shared, for the open file, until its last fput(). */
int ploop_ofd_read_lock(struct file *file, loff_t start)
{
	struct file_lock fl;

	ploop_ofd_init(&fl, file, start, F_RDLCK);
	return vfs_lock_file(file, F_SETLK, &fl, NULL);
}

/* Whether another open file holds any lock on the byte; tells the holder, -1 if it has no pid. */
bool ploop_ofd_is_locked(struct file *file, loff_t start, pid_t *pid)
{
	struct file_lock fl;
	bool is_locked;

	ploop_ofd_init(&fl, file, start, F_WRLCK);
	is_locked = !vfs_test_lock(file, &fl) && fl.c.flc_type != F_UNLCK;
	if (is_locked)
		*pid = fl.c.flc_pid;
	/* What a lock of an NFS server's client holds was counted for us. */
	locks_release_private(&fl);
	return is_locked;
}

void ploop_ofd_unlock(struct file *file, loff_t start)
{
	struct file_lock fl;

	ploop_ofd_init(&fl, file, start, F_UNLCK);
	/* Nothing to be done about a failure; the last fput() unlocks too. */
	vfs_lock_file(file, F_SETLK, &fl, NULL);
}

struct ploop_errand {
	struct work_struct work;
	void (*run)(void *arg);
	void *arg;
};

static void ploop_errand_run(struct work_struct *work)
{
	struct ploop_errand *errand = container_of(work, struct ploop_errand, work);

	errand->run(errand->arg);
}

/* Calls a function on a worker, and waits for it whatever signal comes. */
void ploop_errand(struct workqueue_struct *wq, void (*run)(void *arg), void *arg)
{
	struct ploop_errand errand = { .run = run, .arg = arg };

	INIT_WORK_ONSTACK(&errand.work, ploop_errand_run);
	queue_work(wq, &errand.work);
	flush_work(&errand.work);
	destroy_work_on_stack(&errand.work);
}

/* Whether a signal can end the current task. */
bool ploop_is_mortal(void)
{
	return !(current->flags & PF_KTHREAD);
}

/*
 * Makes the freeze that follows short: the queue's users are counted in one place from here on, so
 * that nobody has to wait for an RCU grace period with requests shut out. Requests go on meanwhile.
 */
void ploop_freeze_prepare(struct request_queue *q)
{
	percpu_ref_switch_to_atomic_sync(&q->q_usage_counter);
}

/* After that freeze, or instead of it: users are counted for each CPU again. */
void ploop_freeze_ended(struct request_queue *q)
{
	percpu_ref_switch_to_percpu(&q->q_usage_counter);
}

/*
 * From here on the task gets the memory that there is, the kernel's reserves included, or none: it
 * waits for nobody.
 */
unsigned int ploop_no_reclaim_begin(void)
{
	return memalloc_noreclaim_save();
}

void ploop_no_reclaim_end(unsigned int flags)
{
	memalloc_noreclaim_restore(flags);
}

/* No new request enters from here on; those in flight go on. */
unsigned int ploop_freeze_start(struct request_queue *q)
{
	unsigned int flags = memalloc_noio_save();

	trace_ploop_hold(q->disk->first_minor / q->disk->minors, true);
	blk_freeze_queue_start(q);
	return flags;
}

/* Whether no request is in flight any more. */
bool ploop_freeze_wait(struct request_queue *q, unsigned int ms)
{
	return blk_mq_freeze_queue_wait_timeout(q, msecs_to_jiffies(ms)) > 0;
}

void ploop_unfreeze_queue(struct request_queue *q, unsigned int flags)
{
	blk_mq_unfreeze_queue(q, flags);
	trace_ploop_hold(q->disk->first_minor / q->disk->minors, false);
}

/*
 * As blk_mq_wait_quiesce_done() for a tag set whose queue_rq may sleep, but at once: requests are
 * shut out meanwhile.
 */
void ploop_wait_dispatched(struct blk_mq_tag_set *set)
{
	synchronize_srcu_expedited(set->srcu);
}

int ploop_set_limits(struct gendisk *disk, struct queue_limits *lim)
{
	/* Starts from the old limits only to take their lock; ours replace them all. */
	(void)queue_limits_start_update(disk->queue);
	return queue_limits_commit_update_frozen(disk->queue, lim);
}

unsigned int ploop_disk_openers(struct gendisk *disk)
{
	return disk_openers(disk);
}

void ploop_disk_open_lock(struct gendisk *disk)
{
	mutex_lock(&disk->open_mutex);
}

void ploop_disk_open_unlock(struct gendisk *disk)
{
	mutex_unlock(&disk->open_mutex);
}

bool ploop_bdev_is_partition(struct block_device *bdev)
{
	return bdev_is_partition(bdev);
}

struct gendisk *ploop_kobj_to_disk(struct kobject *kobj)
{
	return dev_to_disk(kobj_to_dev(kobj));
}

#ifdef CONFIG_LOCKDEP
/*
 * Lock classes of a disk of its own. From queue_rq bios enter the queue below, which may be another disk's
 * of ours: a lock that is held around a wait for queue_rq comes before those of that queue, and would seem
 * to be the other way round too if it were in one class with them. And a flush of the device below ends
 * in its lock, and ours with it, on its way out.
 */
struct ploop_lock_classes {
	struct lock_class_key flush;
	struct lock_class_key elevator;
	struct lock_class_key srcu;
};
#endif

/* The data of a tag set: such classes; NULL without lockdep, or without memory. */
void *ploop_lock_classes_new(void)
{
#ifdef CONFIG_LOCKDEP
	struct ploop_lock_classes *classes = kzalloc(sizeof(*classes), GFP_KERNEL);

	if (classes) {
		lockdep_register_key(&classes->flush);
		lockdep_register_key(&classes->elevator);
		lockdep_register_key(&classes->srcu);
	}
	return classes;
#else
	return NULL;
#endif
}

void ploop_lock_classes_free(void *data)
{
#ifdef CONFIG_LOCKDEP
	struct ploop_lock_classes *classes = data;

	if (!classes)
		return;
	lockdep_unregister_key(&classes->srcu);
	lockdep_unregister_key(&classes->elevator);
	lockdep_unregister_key(&classes->flush);
	kfree(classes);
#endif
}

/* Gives a new queue those of its tag set. */
void ploop_queue_lock_classes(struct request_queue *q)
{
#ifdef CONFIG_LOCKDEP
	struct ploop_lock_classes *classes = q->tag_set->driver_data;

	if (!classes)
		return;
	lockdep_set_class(&q->elevator_lock, &classes->elevator);
#ifdef CONFIG_DEBUG_LOCK_ALLOC
	lockdep_init_map(&q->tag_set->srcu->dep_map, "ploop set->srcu", &classes->srcu, 0);
#endif
#endif
}

/* blk_mq_ops.init_hctx; data is that of the tag set. */
int ploop_init_hctx(struct blk_mq_hw_ctx *hctx, void *data, unsigned int idx)
{
#ifdef CONFIG_LOCKDEP
	struct ploop_lock_classes *classes = data;

	if (classes)
		blk_mq_hctx_set_fq_lock_class(hctx, &classes->flush);
#endif
	return 0;
}

struct page *ploop_virt_to_page(void *addr)
{
	return virt_to_page(addr);
}

void ploop_page_get(void *addr)
{
	get_page(virt_to_page(addr));
}

struct srcu_struct *ploop_epoch_new(void)
{
	struct srcu_struct *ssp = kmalloc(sizeof(*ssp), GFP_KERNEL);

	if (ssp && init_srcu_struct(ssp)) {
		kfree(ssp);
		return NULL;
	}
	return ssp;
}

/* Nobody is inside any more. */
void ploop_epoch_free(struct srcu_struct *ssp)
{
	cleanup_srcu_struct(ssp);
	kfree(ssp);
}

int ploop_epoch_enter(struct srcu_struct *ssp)
{
	return srcu_down_read(ssp);
}

void ploop_epoch_leave(struct srcu_struct *ssp, int idx)
{
	srcu_up_read(ssp, idx);
}

void ploop_epoch_wait(struct srcu_struct *ssp)
{
	synchronize_srcu_expedited(ssp);
}

/*
 * Freezes the file systems on the disk and all its partitions. A block device without one counts
 * as frozen too: nothing can be mounted on it meanwhile.
 */
int ploop_fs_freeze(struct gendisk *disk, struct ploop_frozen_fs *fs)
{
	int ret = 0;
	unsigned int i;

	fs->nr = 0;
	for (i = 0; i < PLOOP_PARTITIONS && !ret; i++) {
		struct block_device *part;
		struct file *file;
		dev_t dev;

		/* Those for which the disk has no minor have a number from elsewhere. */
		rcu_read_lock();
		part = xa_load(&disk->part_tbl, i);
		dev = part ? part->bd_dev : 0;
		rcu_read_unlock();
		if (!dev)
			continue;
		file = bdev_file_open_by_dev(dev, BLK_OPEN_READ, NULL, NULL);
		if (IS_ERR(file)) {
			ret = PTR_ERR(file);
			/* The partition has just gone. */
			if (ret == -ENXIO)
				ret = 0;
			continue;
		}
		/* The same, and a partition of another disk has got its number. */
		if (file_bdev(file)->bd_disk != disk) {
			fput(file);
			continue;
		}
		ret = bdev_freeze(file_bdev(file));
		if (ret)
			fput(file);
		else
			fs->files[fs->nr++] = file;
	}
	if (ret)
		ploop_fs_thaw(fs);
	return ret;
}

void ploop_fs_thaw(struct ploop_frozen_fs *fs)
{
	while (fs->nr) {
		struct file *file = fs->files[--fs->nr];

		bdev_thaw(file_bdev(file));
		fput(file);
	}
}

/* Bytes that an unprivileged user may still write to the file system. */
u64 ploop_file_space(struct file *file)
{
	struct kstatfs st;

	if (vfs_statfs(&file->f_path, &st))
		return U64_MAX;
	return (u64)st.f_bavail * st.f_bsize;
}

/* Whether all data of a write is zeros. */
bool ploop_rq_is_zero(struct request *rq)
{
	struct req_iterator iter;
	struct bio_vec bvec;

	rq_for_each_segment(bvec, rq, iter) {
		void *data = bvec_kmap_local(&bvec);
		bool is_zero = !memchr_inv(data, 0, bvec.bv_len);

		kunmap_local(data);
		if (!is_zero)
			return false;
	}
	return true;
}

void ploop_disk_event(struct gendisk *disk, char **env)
{
	kobject_uevent_env(&disk_to_dev(disk)->kobj, KOBJ_CHANGE, env);
}

void ploop_get_disk(struct gendisk *disk)
{
	get_device(disk_to_dev(disk));
}

void ploop_put_disk(struct gendisk *disk)
{
	put_device(disk_to_dev(disk));
}

void ploop_trace_map(u32 device, u32 cluster, u32 slot)
{
	trace_ploop_map(device, cluster, slot);
}

void ploop_trace_unmap(u32 device, u32 cluster, u32 slot)
{
	trace_ploop_unmap(device, cluster, slot);
}

void ploop_trace_copy(u32 device, u32 level, u32 from, u32 to, int result)
{
	trace_ploop_copy(device, level, from, to, result);
}

void ploop_trace_commit(u32 device, int result)
{
	trace_ploop_commit(device, result);
}

void ploop_trace_space(u32 device, u32 clusters, int result)
{
	trace_ploop_space(device, clusters, result);
}

/* INIT_DELAYED_WORK() with a key of the caller's. */
void ploop_init_delayed_work(struct delayed_work *work, work_func_t fn,
			     struct lock_class_key *key)
{
	__INIT_WORK_KEY(&work->work, fn, 0, key);
	timer_setup(&work->timer, delayed_work_timer_fn, TIMER_IRQSAFE);
}

unsigned long ploop_msecs_to_jiffies(unsigned int ms)
{
	return msecs_to_jiffies(ms);
}

bool ploop_fatal_signal_pending(void)
{
	return fatal_signal_pending(current);
}

void ploop_sleep_ms(unsigned int ms)
{
	msleep(ms);
}

bool ploop_sleep_killable_ms(unsigned int ms)
{
	schedule_timeout_killable(msecs_to_jiffies(ms));
	return fatal_signal_pending(current);
}

/*
 * Waits until every task that runs, or was preempted, has been somewhere where it sleeps. Kernels that
 * cannot tell of those that were preempted give them some time.
 */
void ploop_wait_for_leavers(void)
{
	msleep(10);
	synchronize_rcu_tasks();
}
