// SPDX-License-Identifier: GPL-2.0
//! The command line and its help, nothing else.

mod backup;
mod boot;
mod copy;
mod device;
mod disk;

pub use backup::*;
pub use boot::*;
pub use copy::*;
pub use device::*;
pub use disk::*;

use crate::descriptor::guid::Guid;
use crate::error::Code;
use crate::offline::Format;
use crate::size;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Makes, attaches, checks, repairs and changes ploop images and disks with snapshots.
///
/// An image file holds the contents of a disk. Attached, it is the block device /dev/ploopN,
/// which can be partitioned, formatted and mounted. Images of format ploop1 are thin: they grow
/// with what is written. They are QEMU's "parallels" images: qemu-img reads and makes them too.
///
/// A disk with snapshots is a directory of images with a DiskDescriptor.xml that says how they build
/// on each other. Where a DISK is expected, give that file or its directory.
#[derive(Debug, Parser)]
#[command(name = "ploopctl", version, after_long_help = after_help(), after_help = SHORT_HELP)]
#[command(max_term_width = 100, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const SHORT_HELP: &str = "'ploopctl --help' shows examples and exit codes, \
                          'ploopctl COMMAND --help' explains a command.";

fn after_help() -> String {
    let mut text = "\
Sizes:
  A number and K, M, G or T, in powers of 1024 (10G, 64KiB); a bare number is bytes.

Output:
  Answers go to standard output, notes and errors to standard error. With --json, standard
  output is one JSON object with \"schema\": 1, or nothing after an error ('check' has an answer
  also when it finds damage); sizes are bytes.

Examples:
  ploopctl create -s 10G disk.img        make an image of a 10 GiB disk
  ploopctl attach disk.img               attach it; prints /dev/ploop0
  ploopctl attach base.img top.img       read base.img, write to top.img
  ploopctl list                          what is attached
  ploopctl stat --watch 5                what it does
  ploopctl detach disk.img               detach it, by image or by device
  ploopctl check disk.img                look for damage; changes nothing
  ploopctl check --repair disk.img       and mend it
  ploopctl map --json disk.img           where each part of the disk is in the image
  ploopctl create --descriptor -s 10G d  make a disk with a descriptor in the new directory d
  ploopctl attach d                      attach it
  ploopctl snapshot create d             freeze what is written so far; prints its name
  ploopctl snapshot list d               what there is to go back to
  ploopctl trim d                        give back what its file systems do not use
  ploopctl merge base.img top.img        put all that top.img has into base.img
  ploopctl resize -s 20G disk.img        give it a larger disk
  ploopctl compact disk.img              cut what the file does not use
  ploopctl convert -f raw disk.img d.raw make a raw image of it
  ploopctl copy send --to /mnt/d d       copy a disk, also while it is in use
  ploopctl backup full d /backup/d.0     back it up; then only what changes:
  ploopctl backup incremental --parent /backup/d.0 d /backup/d.1

Exit codes:
   0  success
"
    .to_owned();
    for (code, meaning) in Code::ALL {
        text += &format!("  {:2}  {meaning}\n", code as u8);
    }
    text.truncate(text.trim_end().len());
    text
}

/// The commands.
// A comment at a command would take the place of all that its arguments say.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum Command {
    Create(CreateArgs),
    Clone(CloneArgs),
    Attach(AttachArgs),
    Detach(DetachArgs),
    List(ListArgs),
    Stat(StatArgs),
    /// Show what is known about an image or a device
    Info(TargetArgs),
    Check(CheckArgs),
    /// Show where each part of the disk is in the image file
    Map(TargetArgs),
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    Replace(ReplaceArgs),
    Fscheck(FscheckArgs),
    /// Complete or undo what was interrupted
    Recover(DiskArgs),
    /// Judge a descriptor, or make one for images that have lost it
    #[command(subcommand)]
    Descriptor(DescriptorCommand),
    Merge(MergeArgs),
    Resize(ResizeArgs),
    Compact(CompactArgs),
    Convert(ConvertArgs),
    #[command(subcommand)]
    Copy(CopyCommand),
    Trim(TrimArgs),
    #[command(subcommand)]
    Op(OpCommand),
    #[command(subcommand)]
    Backup(BackupCommand),
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    #[command(subcommand)]
    Boot(BootCommand),
}

/// Format of a new image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NewFormat {
    /// Thin image with a table of clusters
    Ploop1,
    /// The disk byte for byte
    Raw,
}

/// Format of an image to attach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum AttachFormat {
    #[default]
    /// ploop1 if the file says so; raw is never guessed
    Auto,
    /// Thin image with a table of clusters
    Ploop1,
    /// The disk byte for byte
    Raw,
}

/// Make a new image.
///
/// The image appears under its name complete and durable, or not at all. An existing file is
/// never overwritten.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  ploopctl create -s 10G disk.img
  ploopctl create -s 1T -b 4M --preallocate disk.img
  ploopctl create -f raw -s 10G disk.raw
  ploopctl create --descriptor -s 10G /vz/101")]
pub struct CreateArgs {
    /// Format of the image
    #[arg(short, long, value_enum, default_value = "ploop1")]
    pub format: NewFormat,
    /// Version of the ploop1 format: 1 is for old software and limited to 2 TiB
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=2))]
    pub format_version: u32,
    /// Size of the disk, a multiple of 512 bytes
    #[arg(short, long, value_parser = size::parse)]
    pub size: u64,
    /// Cluster size of a ploop1 image: a power of two from 32K to 64M [default: 1M]
    #[arg(short = 'b', long, value_name = "SIZE", value_parser = size::parse)]
    pub cluster: Option<u64>,
    /// Allocate all space at once
    #[arg(long)]
    pub preallocate: bool,
    /// Make a disk with a descriptor: a directory with root.hds and DiskDescriptor.xml, which is
    /// made if it does not exist
    #[arg(long)]
    pub descriptor: bool,
    /// Path of the new image, or of the directory with --descriptor
    #[arg(value_name = "IMAGE|DIR")]
    pub image: PathBuf,
}

/// Attach an image to a block device and print the device's path.
///
/// A ploop1 image is checked first. One that was not closed cleanly is repaired if that loses
/// nothing, which is said on standard error; if data would be lost it is refused, and 'ploopctl
/// check --repair' is left to you. A raw image must be asked for with -f raw, and may be a block
/// device.
///
/// Several images are a chain, base first: each has what changed since the one before it. What is
/// written goes to the last one. The others are only read, so that several devices may share them; one
/// that a crash left marked as in use is repaired first, if nobody else has it. They must have one
/// cluster size and one format version, and none may be smaller than the one before it. With -f raw
/// only the base is raw; it has the cluster size of the others.
///
/// Images that a descriptor names are written to only as the whole chain of its top.
///
/// A disk is attached with all the images that its descriptor names. What an earlier command left
/// unfinished there is completed or undone first, which is said on standard error.
#[derive(Debug, Clone, Default, Args)]
#[command(after_help = "\
Examples:
  ploopctl attach disk.img
  ploopctl attach -r -n 7 disk.img       read-only, as /dev/ploop7
  ploopctl attach base.img mid.img top.img
  ploopctl attach /vz/101/DiskDescriptor.xml
  ploopctl attach -r --snapshot 0c5d8f5a-9fc1-4bd2-9e2c-6f5a1d7a6b01 /vz/101
  ploopctl attach -f raw /dev/sdb")]
pub struct AttachArgs {
    /// Attach read-only; no image file is changed in any way, but what is unfinished in a disk is
    /// completed or undone first
    #[arg(short, long)]
    pub read_only: bool,
    /// Repair nothing: refuse an image to be written that needs it; one that is only read is read as
    /// it is
    #[arg(long)]
    pub no_repair: bool,
    /// Attach as /dev/ploopN instead of the first unused one
    #[arg(short = 'n', long, value_name = "N")]
    pub device: Option<u32>,
    /// Format of the image; of several, of the first, the base
    #[arg(short, long, value_enum, default_value = "auto")]
    pub format: AttachFormat,
    /// Cluster size with -f raw: a power of two from 32K to 64M [default: 1M, or that of the other
    /// images]
    #[arg(short = 'b', long, value_name = "SIZE", value_parser = size::parse)]
    pub cluster: Option<u64>,
    /// Text shown with the device, at most 63 bytes
    #[arg(long, value_name = "TEXT")]
    pub cookie: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Attach a snapshot of the disk, read-only
    #[arg(long, value_name = "UUID", requires = "read_only")]
    pub snapshot: Option<Guid>,
    /// Attach a disk although a lower image changed since it was closed
    #[arg(long)]
    pub force: bool,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// A disk; or the images of a chain, base first
    #[arg(required = true, value_name = "DISK|IMAGE")]
    pub images: Vec<PathBuf>,
}

/// Detach a device cleanly.
///
/// All data is written and the image is closed. A device that is mounted or open is left alone, as is
/// one that merges, grows or compacts. Also removes what a killed 'ploopctl attach' or 'ploopctl
/// detach' left behind.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl detach /dev/ploop0
  ploopctl detach disk.img")]
pub struct DetachArgs {
    /// End what it does for long, and let writes fail that wait for space; they are lost. Not of what
    /// is mounted, which is refused. A descriptor that cannot be read or is locked does not keep a
    /// DEVICE
    #[arg(long)]
    pub force: bool,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Device (/dev/ploopN, ploopN or a partition of it), attached disk, or path of an attached image
    #[arg(value_name = "DEVICE|DISK|IMAGE")]
    pub target: PathBuf,
}

/// List the devices.
///
/// The image shown is the one that is written to; --json and 'ploopctl info' show all of a chain.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A device or an image to look at.
///
/// The image of a running device is read as it is on disk, and what the device has not written
/// yet is missing.
#[derive(Debug, Args)]
pub struct TargetArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Device (/dev/ploopN or ploopN) or path of an image; for 'info' also a disk
    #[arg(value_name = "DEVICE|IMAGE|DISK")]
    pub target: PathBuf,
}

/// Look for damage in an image, and mend it.
///
/// Without --repair no image is changed; of a disk, what is unfinished is completed or undone first.
/// Every problem is listed: header fields, the in-use mark, a torn last cluster, and table entries that
/// are misaligned, point into the header, past the end of the file or to a cluster that another one
/// has. Space that nothing uses is counted, but is no damage.
///
/// With --repair the plan is printed first and then carried out, so that a crash at any time does
/// no harm. Nothing is lost by clearing the mark, completing the last cluster and cutting an
/// unused end. An invalid entry becomes a hole, and its data is lost. Of two entries with one
/// cluster the second gets a copy; which of them is right cannot be known. A header that
/// contradicts itself is not repaired.
///
/// Given a device, the image of which is changing, only the entries of its top are judged. So it is with
/// a disk that is attached.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes:
   0  no damage, or all repaired
  11  not an image, or beyond repair
  37  attached or open elsewhere
  41  damaged; --repair mends it

Examples:
  ploopctl check disk.img
  ploopctl check --repair disk.img
  ploopctl check --json disk.img | jq .problems")]
pub struct CheckArgs {
    /// Mend the image
    #[arg(long)]
    pub repair: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Path of an image, a disk, all images of which are checked if it is not attached, or a device
    /// (/dev/ploopN or ploopN)
    #[arg(value_name = "IMAGE|DISK|DEVICE")]
    pub target: PathBuf,
}

/// Format of an image that may be raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GivenFormat {
    /// Thin image with a table of clusters
    Ploop1,
    /// The disk byte for byte; never guessed
    Raw,
}

impl From<GivenFormat> for Format {
    fn from(format: GivenFormat) -> Self {
        match format {
            GivenFormat::Ploop1 => Self::Ploop1,
            GivenFormat::Raw => Self::Raw,
        }
    }
}

/// Merge an image into the one below it.
///
/// LOWER gets all that UPPER has; together they read as before, and then LOWER alone does. Of images
/// that are not attached, UPPER is not changed, and not removed: do that when the command has
/// succeeded, and give the image that was above UPPER the image LOWER instead. If UPPER has the
/// larger disk, LOWER is grown.
///
/// A crash or Ctrl-C at any time loses nothing as long as both are kept: the same command again
/// does the rest. But LOWER alone does not read as before any more, so no other image may
/// build on it. Without --format, LOWER is of format ploop1.
///
/// Both may be attached, one directly above the other in one device that writes to its top: then the
/// kernel merges, the device goes on, and lets go of UPPER, which holds nothing any more if it was the
/// top. With a DEVICE alone its top is merged into the one below, or what --level says. The images of a
/// disk with a descriptor are merged by 'ploopctl snapshot merge' and 'snapshot delete'; attached, here
/// as well, and UPPER is removed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl merge base.img top.img && rm top.img
  ploopctl merge -f raw base.raw top.img
  ploopctl merge /dev/ploop0")]
pub struct MergeArgs {
    /// Format of LOWER
    #[arg(short, long, value_enum, default_value = "ploop1")]
    pub format: GivenFormat,
    /// With DEVICE, the level that is merged into the one below [default: the top]
    #[arg(short, long, value_name = "N", conflicts_with = "upper")]
    pub level: Option<u32>,
    /// Merge also images that a descriptor names, or into one whose file has other names: what builds
    /// on it may be lost, and it is yours to put that right
    #[arg(long)]
    pub force: bool,
    /// How fast the kernel may copy
    #[command(flatten)]
    pub rate: RateArgs,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Image that is merged into, and changed: the lower one of the two, base side; or a device
    #[arg(value_name = "LOWER|DEVICE")]
    pub lower: PathBuf,
    /// Image that is merged: the one attached directly above LOWER; it is only read
    pub upper: Option<PathBuf>,
}

/// Give an image a larger disk.
///
/// It may be attached. Of a chain, resize the last image: none may be smaller than the one below it.
/// A disk cannot become smaller. What is on the disk, partitions and file systems, stays as large
/// as it is; grow it when the image is attached.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl resize -s 20G disk.img
  ploopctl resize -f raw -s 20G disk.raw
  ploopctl resize -s 20G /vz/101")]
pub struct ResizeArgs {
    /// Format of the image
    #[arg(short, long, value_enum, default_value = "ploop1")]
    pub format: GivenFormat,
    /// New size of the disk, a multiple of 512 bytes
    #[arg(short, long, value_parser = size::parse)]
    pub size: u64,
    /// Allocate the new space of a raw image at once
    #[arg(long)]
    pub preallocate: bool,
    /// Also an image that a descriptor beside it names, which will not know of it
    #[arg(long)]
    pub force: bool,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Path of the image, a disk with a descriptor, or a device
    #[arg(value_name = "IMAGE|DISK|DEVICE")]
    pub image: PathBuf,
}

/// Make an image file smaller by what it does not use.
///
/// Clusters at the end of the file move into unused places before it, and the file is cut. Any image
/// of a chain may be compacted; if it is attached, the top. The images of a disk with a descriptor are
/// compacted together: give the disk. What a file system has freed is in use for the image until it is
/// trimmed: see 'ploopctl trim'.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl compact disk.img
  ploopctl compact --drop-zeros base.img
  ploopctl compact /vz/101")]
pub struct CompactArgs {
    /// Also read all of the image and drop clusters full of zeros. IMAGE must be a base: above
    /// another image, zeros hide what is below
    #[arg(long)]
    pub drop_zeros: bool,
    /// Also an image that a descriptor names, or whose file has other names: what builds on it may be
    /// refused then
    #[arg(long)]
    pub force: bool,
    /// How fast the kernel may copy
    #[command(flatten)]
    pub rate: RateArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Path of the image, a device, or a disk with a descriptor: if it is attached its top is
    /// compacted, else all its images
    #[arg(value_name = "IMAGE|DISK|DEVICE")]
    pub image: PathBuf,
}

/// Format of a converted image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NewKind {
    /// The disk byte for byte
    Raw,
    /// Thin image with a table of clusters ("expanded")
    Ploop1,
    /// The same with all space allocated
    Preallocated,
}

/// Make an image of another format.
///
/// OUT is a new image of the disk that IMAGE is. Several images are a chain, base first, and OUT is
/// one image of all. A disk with a descriptor is the chain of its top, or of a snapshot. Without OUT,
/// with --in-place, the new image takes the place of IMAGE when it is complete. Clusters full of
/// zeros take no space in OUT, unless all is allocated. The images must not be attached.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ploopctl convert -f raw disk.img disk.raw
  ploopctl convert --from raw -f ploop1 disk.raw disk.img
  ploopctl convert -f ploop1 base.img mid.img top.img whole.img
  ploopctl convert -f raw /vz/101 disk.raw
  ploopctl convert -f ploop1 -v 2 --in-place old.img")]
pub struct ConvertArgs {
    /// Format of the new image
    #[arg(short, long, value_enum)]
    pub format: NewKind,
    /// Version of the ploop1 format [default: 2]
    #[arg(short = 'v', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=2))]
    pub format_version: Option<u32>,
    /// Cluster size of a ploop1 image [default: that of IMAGE]
    #[arg(short = 'b', long, value_name = "SIZE", value_parser = size::parse)]
    pub cluster: Option<u64>,
    /// Format of IMAGE; of several, of the first, the base
    #[arg(long, value_enum, default_value = "ploop1")]
    pub from: GivenFormat,
    /// Put the new image in the place of the one IMAGE. Not for an image of a chain
    #[arg(long)]
    pub in_place: bool,
    /// With --in-place, also an image that a descriptor beside it names
    #[arg(long)]
    pub force: bool,
    /// With a disk, the snapshot that OUT is to be of [default: the top]
    #[arg(long, value_name = "UUID")]
    pub snapshot: Option<Guid>,
    /// How long to wait for others that work on the disk
    #[command(flatten)]
    pub wait: WaitArgs,
    /// A disk, or images of a chain, base first, most often one; then OUT
    #[arg(required = true, value_names = ["IMAGE|DISK", "OUT"])]
    pub paths: Vec<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    /// A comment at a command took the place of what its arguments say of it, in `--help` and the
    /// manual page: nothing but one line was left of all the explanations.
    #[test]
    fn help_says_more_than_the_list_of_commands() {
        let mut command = Cli::command();
        command.build();
        for (name, words) in [
            ("attach", "Several images are a chain"),
            ("check", "Without --repair no image is changed"),
            ("clone", "hard links"),
            ("convert", "The images must not be attached"),
            ("detach", "All data is written"),
            ("merge", "LOWER gets all"),
            ("snapshot", "A snapshot is what was on the disk"),
            ("stat", "With --watch"),
            ("trim", "dm-crypt"),
        ] {
            let found = command.find_subcommand_mut(name);
            let help = found.map(|c| c.render_long_help().to_string());
            let help = help.unwrap_or_default().replace('\n', " ");
            assert!(help.contains(words), "{name}: {help}");
        }
        // And the list has one line for each.
        for sub in command.get_subcommands() {
            let about = sub.get_about().map(|a| a.to_string()).unwrap_or_default();
            assert!(
                !about.is_empty() && !about.ends_with('.'),
                "{}: {about}",
                sub.get_name()
            );
        }
    }
}
