//! The command line: every command, option and help text. Shell completion, man pages and
//! docs/operations/cli.md are made from these definitions, so that they cannot disagree.
//!
//! To people a VDI is a disk: help texts and messages use the word that they know.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{
    NonEmptyStringValueParser, OsStringValueParser, TypedValueParser, ValueParser,
};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use jiff::SignedDuration;
use stream::Progress;

/// Virtual disks with instant snapshots and clones, for virtual machines.
///
/// A store is a file or a block device. One daemon serves it (`parallax serve`); every other
/// command talks to that daemon over its control socket, and works on running disks.
///
/// To try it out, with nothing prepared: parallax quickstart
#[derive(Debug, Parser)]
#[command(
    name = "parallax",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true,
    after_long_help = format!("{EXIT_CODES}\n\n{ENVIRONMENT}")
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What scripts see; `exit.rs` maps errors to these.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  wrong usage, or a request that cannot be carried out as it stands
  2  the disk, snapshot or store does not exist
  3  busy: somebody else holds what is needed
  4  damaged: stored bytes are not what they must be
  5  no space left
  6  any other I/O error; also when no daemon answers, or after Ctrl-C
  7  what was to be received is not a whole stream, or not what was sent";

/// What else decides what a command does.
pub(crate) const ENVIRONMENT: &str = "\
Environment:
  PARALLAX_SOCKET     control socket of the daemon, unless --socket is given
  PARALLAX_IO_ENGINE  how a store is read and written: io_uring, threads or auto";

/// Options of every command.
#[derive(Args, Clone, Debug)]
pub(crate) struct Global {
    /// Control socket of the daemon
    ///
    /// Without it: what PARALLAX_SOCKET names, else /run/parallax.sock for root and parallax.sock
    /// in $XDG_RUNTIME_DIR for others.
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        value_parser = OsStringValueParser::new().map(PathBuf::from)
    )]
    #[arg(value_hint = ValueHint::AnyPath, help_heading = "Global options")]
    pub(crate) socket: Option<PathBuf>,

    /// Print JSON, for programs; errors too, on stderr
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Try Parallax: make a small store, serve a disk, say what to do next
    ///
    /// Creates DIR with a store in one file (sparse, 64 GiB) and a disk `demo` of 10 GiB, unless
    /// they are there already, and serves them until Ctrl-C. Nothing outside DIR is touched: the
    /// control socket is DIR/parallax.sock unless --socket is given, whatever the environment says.
    Quickstart {
        /// Where everything goes
        #[arg(value_name = "DIR", default_value = "parallax-data", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
        /// Use the page cache: only for file systems without direct I/O
        #[arg(long)]
        buffered: bool,
    },

    /// Write an empty store to a file or block device
    ///
    /// Refuses a device that looks used. Everything on it is lost with --force.
    Format(Format),

    /// Run the daemon: serve the disks of a store until SIGTERM or Ctrl-C
    ///
    /// Prints one line that starts with "ready" (and notifies systemd) when clients can connect.
    /// A store that was not closed cleanly is recovered first; nothing acknowledged is lost.
    ///
    /// The daemon always serves NBD on a unix socket of its own beside the control socket
    /// (for import, export and local clients); --nbd adds further addresses.
    Serve(Serve),

    /// Create an empty disk; it takes no space until it is written
    ///
    /// A name has letters (of any language), digits and - _ . / : +, begins with a letter, a digit or
    /// _, and is at most 191 bytes long.
    Create {
        #[command(flatten)]
        name: NewName,
        /// Logical size, such as 20G (units are powers of 1024); rounded up to whole 4 KiB blocks
        #[arg(long, value_name = "SIZE", value_parser = size(), allow_hyphen_values = true)]
        size: u64,
        /// Keep its past: 24h, or rules as `set` takes them; without it, as the store does
        #[arg(long, value_name = "HISTORY", value_parser = NonEmptyStringValueParser::new())]
        history: Option<String>,
    },

    /// Change a setting of a disk, or of all disks that have none of their own: history=24h
    ///
    /// With a history, a disk can be opened, cloned and rolled back to as it was: NAME@TIME stands for
    /// the newest moment at that time or before, such as web01@2026-11-22T10:15:30Z or
    /// web01@'5 minutes ago'. `history=24h` keeps the moment after each flush for a day; rules keep
    /// fewer of older ones: history='every flush for 1h, 1s for 1d, 1h for 30d'. `history=off` deletes
    /// what was kept. Snapshots that were asked for stay, and so does what is held.
    ///
    /// With `at most SIZE` behind its rules, as history='24h, at most 20G', the oldest moments go when all
    /// of them hold more than that which no disk needs as it is now. `info` shows how much it is.
    ///
    /// `--store history=24h` is for all disks that were given no history of their own, those that are
    /// made later, too. `history=inherit` makes a disk one of these again.
    Set {
        /// Name of the disk
        #[arg(value_name = "NAME", value_parser = disk(), required_unless_present = "store")]
        name: Option<String>,
        /// What is to be set
        #[arg(value_name = "history=HISTORY", value_parser = setting())]
        #[arg(required_unless_present = "store")]
        setting: Option<Setting>,
        /// Set it for all disks that have none of their own
        #[arg(long, value_name = "history=HISTORY", value_parser = setting())]
        #[arg(conflicts_with_all = ["name", "setting"])]
        store: Option<Setting>,
    },

    /// Show what happened to a disk with a history, and when
    ///
    /// A row for each interval in which something was written: how much, what stands for the end of
    /// it, and which snapshots were taken. To see more of an hour, give a shorter interval.
    ///
    /// With --writes a row for each write instead, if the disk's history begins with `every write`: the
    /// handle of the disk as it was after it, for everything that reads, and what it changed.
    Log {
        #[command(flatten)]
        name: Name,
        /// Length of an interval, such as 1s, 15m or '1 day'; without it, one that fits a screen
        #[arg(long, value_name = "INTERVAL", value_parser = NonEmptyStringValueParser::new())]
        every: Option<String>,
        /// Show the writes that can be opened, the last one up to a moment (its number, a label or a
        /// time); without one, up to now
        #[arg(long, value_name = "MOMENT", conflicts_with = "every")]
        writes: Option<Option<String>>,
        /// How many rows to show at most, the latest
        #[arg(long, value_name = "COUNT", default_value_t = 40)]
        rows: usize,
    },

    /// Make a new disk from a disk or snapshot, at once and without copying data
    Clone {
        /// What to clone; without @SNAP the disk as it is now, even if it is in use; a time in place
        /// of SNAP means the disk as it was then, lsn:107 the disk after that write
        #[arg(value_name = "SRC[@SNAP]", value_parser = handle())]
        source: String,
        /// Name of the new disk
        #[arg(value_name = "NEW", value_parser = NonEmptyStringValueParser::new())]
        new: String,
    },

    /// Take a snapshot of a disk, even while it is in use; prints its handle
    ///
    /// It holds every write that was acknowledged before. The handle is NAME@LABEL, or NAME@17 if
    /// no label is given.
    ///
    /// With --every and --for the daemon takes a series by itself, thousands in a second if need be, and the handle
    /// is that of all: NAME@17..1016, which `rm` takes, too.
    Snapshot {
        /// Name of the disk
        #[arg(value_name = "NAME", value_parser = snapshot_of())]
        name: String,
        /// A name for the snapshot, unique within the disk
        #[arg(long, short, value_name = "LABEL", value_parser = NonEmptyStringValueParser::new())]
        label: Option<String>,
        /// Hold it at once, as `hold` does
        #[arg(long)]
        hold: bool,
        /// When the hold ends by itself
        #[arg(long, value_name = "TIME", value_parser = NonEmptyStringValueParser::new())]
        #[arg(requires = "hold")]
        until: Option<String>,
        /// Take a series: one each so long, such as 100us, 1ms or 5s
        #[arg(long, value_name = "TIME", value_parser = span())]
        #[arg(requires = "length", conflicts_with_all = ["label", "hold"])]
        every: Option<Duration>,
        /// How long the series goes on, such as 10s
        #[arg(long = "for", value_name = "TIME", value_parser = span(), requires = "every")]
        length: Option<Duration>,
    },

    /// Hold a snapshot: it cannot be deleted, nor its disk, until the hold ends
    ///
    /// No history thins what is held, not even when the store is full. A moment may be held, too, also by
    /// its time: NAME@'5 minutes ago'. The hold ends with `release`, or when the time of --until has
    /// come; for a clock that leaps, as much time must have passed while the store was served.
    /// A moment that is held stands for itself: writes before it that it kept (`every write`) cannot be
    /// opened any more.
    ///
    /// What is held, and when it ended, goes into a ledger of the disk, whose head `info` shows. Note it
    /// elsewhere: `check` tells of what was altered or removed since it was held.
    Hold {
        /// Which snapshot or moment of which disk
        #[arg(value_name = "NAME@SNAP", value_parser = snapshot_target())]
        target: (String, String),
        /// When the hold ends by itself: 2030-01-31, 2030-01-31T18:00:00Z, or how long, such as 30d
        #[arg(long, value_name = "TIME", value_parser = NonEmptyStringValueParser::new())]
        until: Option<String>,
    },

    /// End the hold of a snapshot: it stays, and can be deleted
    Release {
        /// Which snapshot or moment of which disk
        #[arg(value_name = "NAME@SNAP", value_parser = snapshot_target())]
        target: (String, String),
    },

    /// List the snapshots of a disk, oldest first
    Snapshots {
        #[command(flatten)]
        name: Name,
        /// Also the moments that its history keeps, however many there are
        #[arg(long)]
        all: bool,
    },

    /// List disks
    #[command(visible_alias = "list")]
    Ls {
        /// Count the space of each, as `info` does: takes a moment for many or large disks
        #[arg(long, short)]
        space: bool,
    },

    /// Draw the family tree of disks, snapshots and clones
    Tree {
        /// Show snapshots that nothing was cloned from, too, however many there are
        #[arg(long)]
        all: bool,
    },

    /// Describe a disk or snapshot: sizes, shared and exclusive space, origin
    ///
    /// Counts space by walking the disk's tree, which takes a moment on a large one.
    Info {
        /// A disk, or one of its snapshots by label or number
        #[arg(value_name = "NAME[@SNAP]", value_parser = target())]
        #[arg(required_unless_present = "store")]
        target: Option<(String, Option<String>)>,
        /// Describe the store: where it is, and what it keeps for all disks
        #[arg(long, conflicts_with = "target")]
        store: bool,
    },

    /// Rename a disk; clients that have it open go on
    Rename {
        #[command(flatten)]
        name: Name,
        /// Its new name
        #[arg(value_name = "NEW", value_parser = NonEmptyStringValueParser::new())]
        new: String,
    },

    /// Change the size of a disk
    ///
    /// A client that is connected while it grows sees the new size when it connects again.
    Resize {
        #[command(flatten)]
        name: Name,
        /// New logical size, such as 40G, or +10G for so much more
        #[arg(value_name = "[+]SIZE", value_parser = new_size())]
        size: NewSize,
        /// Allow a smaller size: contents beyond it are lost, and clients are disconnected
        #[arg(long)]
        shrink: bool,
    },

    /// Delete a disk with all its snapshots, or one snapshot
    ///
    /// Clones are not affected, whatever they were cloned from. Clients of what is deleted are
    /// disconnected; what is attached has to be detached first. Its space counts as free when
    /// garbage has been collected, which happens by itself: see `parallax gc --help`. What is held is not
    /// deleted: see `parallax hold --help`. NAME@17..1016 deletes a series: what has such a number, but no
    /// label, and is not held.
    #[command(visible_alias = "remove")]
    Rm {
        #[command(flatten)]
        target: Target,
    },

    /// Put a disk back to one of its snapshots
    ///
    /// What was written since is lost, unless a snapshot or the disk's history holds it. Snapshots
    /// stay, later ones too. Clients of the disk are disconnected. NAME@'5 minutes ago' goes back in
    /// the history, NAME@lsn:107 to a write that `parallax log NAME --writes` lists.
    Rollback {
        /// Which snapshot of which disk
        #[arg(value_name = "NAME@SNAP", value_parser = snapshot_target())]
        target: (String, String),
    },

    /// List the byte ranges in which two disks or snapshots differ
    Diff {
        /// The one to compare with
        #[arg(value_name = "A", value_parser = handle())]
        from: String,
        /// The one whose changes are listed
        #[arg(value_name = "B", value_parser = handle())]
        to: String,
    },

    /// Copy a file into a new disk: raw, qcow2 and whatever else qemu-img reads
    ///
    /// The disk gets the size of the file's contents; holes stay holes. It is removed again if
    /// the import fails. Needs qemu-img. A raw stream goes in through NBD: nbdcopy - URL
    Import {
        /// The file to read
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
        #[command(flatten)]
        name: NewName,
        /// What the file is, as qemu-img calls it, instead of finding out; also allows files that
        /// refer to other files (backing files)
        #[arg(long, value_name = "FORMAT", value_parser = format_name())]
        format: Option<String>,
    },

    /// Copy a disk or snapshot into a file, without the holes
    ///
    /// A running disk is exported as of this moment, through a snapshot that is deleted
    /// afterwards. Needs qemu-img.
    Export {
        #[command(flatten)]
        target: Target,
        /// The file to write; it appears when it is complete
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// What to write, as qemu-img calls it; without it by the file's extension, else raw
        #[arg(long, value_name = "FORMAT", value_parser = format_name())]
        format: Option<String>,
        /// Replace the file if it exists
        #[arg(long)]
        force: bool,
    },

    /// Write a snapshot to stdout as a stream, for `receive` at another store
    ///
    /// Of a disk a snapshot is taken, which stays: the next stream builds on it. With --from the
    /// stream has only what differs from an earlier snapshot, which must be the newest one of the
    /// disk that receives it. Holes do not travel. docs/guides/backup.md has command lines.
    Send(SendArgs),

    /// Read a stream of `send` from stdin, into a new disk or one that has what it builds on
    ///
    /// The disk changes when the stream has come to its end and every byte of it was verified, and
    /// then all at once; clients of it are disconnected. Until then what came is in a disk
    /// NAME.partial, which stays if the stream was cut short: --resume-token tells how to go on.
    Receive(ReceiveArgs),

    /// Attach a disk or snapshot to a virtual machine (vhost-user-blk), or to this one (ublk)
    ///
    /// With --vhost-user it creates a socket for one virtual machine, which gets at the disk through
    /// shared memory: QEMU, Cloud Hypervisor or whatever else speaks vhost-user-blk;
    /// docs/guides/qemu.md has command lines. With --ublk it makes a block device of this machine, and
    /// prints its path; docs/guides/host.md shows what to do with it. The attachment stays until it is
    /// detached, also when the daemon is started anew.
    Attach {
        #[command(flatten)]
        target: Target,
        /// Where to create the socket; who may use it follows from the umask of the daemon
        #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
        #[arg(required_unless_present = "ublk", conflicts_with = "ublk")]
        vhost_user: Option<PathBuf>,
        /// Make a block device /dev/ublkbN; takes Linux 6.5 or newer, and root
        #[arg(long)]
        ublk: bool,
    },

    /// End an attachment: the virtual machine is disconnected, or the block device taken away
    ///
    /// What is in flight is completed. Switch the virtual machine off or unplug the disk first:
    /// without its disk it waits. A block device that is in use is not taken away.
    Detach {
        /// The socket or the block device
        #[arg(value_name = "PATH", value_hint = ValueHint::AnyPath)]
        path: PathBuf,
    },

    /// List the disks that are attached to virtual machines, or are block devices
    Attachments,

    /// Show all disks as files in a directory, and their snapshots in `.snapshots` there (FUSE)
    ///
    /// A file NAME.img is the disk itself: what is written to it is on the disk. losetup makes a
    /// block device of it; docs/guides/host.md has command lines. A process in the background keeps the
    /// mount, also while the daemon is started anew, until it is unmounted.
    Mount(MountArgs),

    /// End a mount that nobody uses any more
    Unmount {
        /// The directory
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },

    /// List the directories at which disks are mounted
    Mounts,

    /// Have the daemon become another version of itself, under whoever uses its disks
    ///
    /// It ends well, and the next one begins with the same process id, arguments and sockets. NBD
    /// clients connect again (QEMU with reconnect-delay, nbdfuse and others by themselves); virtual
    /// machines over vhost-user (with reconnect-ms) and mounts wait for some tenths of a second.
    Upgrade {
        /// The program; without it what lies now where the daemon was started from
        #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
        binary: Option<PathBuf>,
    },

    /// Look for damage in a store that no daemon serves, and repair it
    ///
    /// Reads everything that the store's disks and snapshots use, and verifies it. Writes nothing
    /// without --repair. Ends with exit code 4 if something is wrong.
    Check(Check),

    /// Show what stands on a store that no daemon serves: superblock, log, trees
    ///
    /// Reads only. For people who look for the cause of damage; docs/on-disk-format.md explains
    /// the terms. The text may change with any version.
    Dump(Dump),

    /// Show what the daemon does: space, requests, cache, log
    Stats {
        /// Refresh until Ctrl-C, with rates
        #[arg(long, short)]
        watch: bool,
        /// Seconds between two refreshes
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds())]
        #[arg(requires = "watch")]
        interval: Duration,
    },

    /// Free what only deleted disks and snapshots used, now, and give the space back
    ///
    /// The daemon does so by itself: a minute after something was deleted, sooner while less than half of the
    /// store is free, and before a write is refused for lack of space. Guests go on meanwhile. The space of
    /// free blocks goes back to the file system or the thin device that the store lies on, unless it was
    /// formatted with --preallocate; here that of all of them does.
    Gc {
        /// Only tell what the garbage collection is doing, and what it did the last time
        #[arg(long)]
        status: bool,
    },

    /// Read and verify everything that is stored, now, and tell what is damaged
    ///
    /// The daemon does so by itself from time to time: see `serve --scrub-every`. Every block in use is read
    /// from the device once, however many snapshots share it. Guests go on, and what they write meanwhile is
    /// left to the next time. Nothing is changed. If it finds damage, it says whose, and ends with code 4.
    ///
    /// Ctrl-C leaves the daemon at it; `--stop` ends it.
    Scrub {
        /// Read so many bytes in a second, such as 100M; 0 for no limit [default: that of `serve`]
        ///
        /// Also for a scrub that is running.
        #[arg(long, value_name = "SIZE", value_parser = rate(), conflicts_with_all = ["status", "stop"])]
        rate: Option<u64>,
        /// Only tell how far it is, and what it found the last time
        #[arg(long, conflicts_with = "stop")]
        status: bool,
        /// End the one that is running
        #[arg(long)]
        stop: bool,
    },

    /// Print a completion script for a shell
    ///
    /// For bash: parallax completion bash > /etc/bash_completion.d/parallax
    Completion {
        /// Which shell
        #[arg(value_name = "SHELL")]
        shell: clap_complete::Shell,
    },

    /// Write a man page for each command into a directory
    Man {
        /// The directory; it is created if there is none
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
}

/// A disk that exists.
#[derive(Args, Debug)]
pub(crate) struct Name {
    /// Name of the disk
    #[arg(value_name = "NAME", value_parser = disk())]
    pub(crate) name: String,
}

/// A disk that is to be made.
#[derive(Args, Debug)]
pub(crate) struct NewName {
    /// Name of the new disk
    #[arg(id = "new", value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) name: String,
}

/// A disk or a snapshot.
#[derive(Args, Debug)]
pub(crate) struct Target {
    /// A disk, or one of its snapshots by label or number
    #[arg(value_name = "NAME[@SNAP]", value_parser = target())]
    pub(crate) target: (String, Option<String>),
}

#[derive(Args, Debug)]
pub(crate) struct Format {
    /// The file or block device
    #[arg(value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) path: PathBuf,
    /// Create the file with this size, or grow it to it
    #[arg(long, value_name = "SIZE", value_parser = size())]
    pub(crate) size: Option<u64>,
    /// Unit in which hosts take space: a power of two from 16M [default: 2G, less on a small store]
    #[arg(long, value_name = "SIZE", value_parser = size())]
    pub(crate) extent_size: Option<u64>,
    /// Format even if PATH looks used; everything on it is lost
    #[arg(long)]
    pub(crate) force: bool,
    /// Whether a file's space is taken from the file system now or as it is needed
    #[arg(long, value_enum, default_value_t = Preallocate::Off, value_name = "MODE")]
    pub(crate) preallocate: Preallocate,
    /// Use the page cache: only for file systems without direct I/O
    #[arg(long)]
    pub(crate) buffered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Preallocate {
    /// A sparse file: quick and small, but the file system may run full under it
    Off,
    /// All of it, without writing it: quick, and the file system cannot run full under it
    Falloc,
    /// All of it, written with zeroes: takes as long as writing it does, and guests get the most
    Full,
}

#[derive(Args, Debug)]
pub(crate) struct Check {
    /// The store; with --online it is the daemon's
    #[arg(value_name = "PATH", value_hint = ValueHint::FilePath)]
    #[arg(required_unless_present = "online")]
    pub(crate) path: Option<PathBuf>,
    /// Have the daemon check the store that it serves; guests go on
    ///
    /// Checks what one checkpoint has published: all but the log and the older copy. The space that becomes
    /// free while metadata is read is held back until that has ended. Data is read by scrub, at its
    /// rate.
    #[arg(long, conflicts_with_all = ["path", "repair", "buffered"])]
    pub(crate) online: bool,
    /// Repair what can be repaired, then check again
    ///
    /// Superblock copies, tables and bitmaps are written afresh from what is intact. Blocks of
    /// disks that are damaged stay so: they give I/O errors until they are written again.
    #[arg(long)]
    pub(crate) repair: bool,
    /// Check metadata only, not the data of disks: takes seconds instead of minutes
    #[arg(long)]
    pub(crate) quick: bool,
    /// Find out whether the ledger of a disk still holds what `hold` or `info` once showed of it
    ///
    /// Who has altered or removed what was held, and then the ledger, too, cannot have kept that. Holds that ended
    /// since are warned of. It is an error as well if nothing can be told, as when old records were folded.
    #[arg(long, value_name = "NAME=RECORD:DIGITS")]
    pub(crate) ledger: Vec<String>,
    /// Use the page cache: only for file systems without direct I/O
    #[arg(long)]
    pub(crate) buffered: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Dump {
    /// The store
    #[arg(value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) path: PathBuf,
    /// What to show [default: superblock slots disks]
    #[arg(value_enum, value_name = "PART")]
    pub(crate) parts: Vec<DumpPart>,
    /// Show the tree of a disk or snapshot: its nodes, and where its blocks lie
    #[arg(long, value_name = "NAME[@SNAP]", value_parser = handle())]
    pub(crate) tree: Vec<String>,
    /// Use the page cache: only for file systems without direct I/O
    #[arg(long)]
    pub(crate) buffered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DumpPart {
    /// The superblock and the state of its copies
    Superblock,
    /// Both copies of the host slot: roots and log segments
    Slots,
    /// The log, with every record
    Log,
    /// Disks and snapshots, with their roots
    Disks,
    /// What each extent is for
    Extents,
    /// How full each part of the store is
    Bitmaps,
}

#[derive(Args, Debug)]
pub(crate) struct SendArgs {
    /// A disk, or one of its snapshots by label or number
    #[arg(value_name = "NAME[@SNAP]", value_parser = target())]
    pub(crate) target: (String, Option<String>),
    /// The snapshot that the receiver has; without a name one of the same disk
    #[arg(long, value_name = "[NAME]@SNAP", value_parser = base())]
    pub(crate) from: Option<(Option<String>, String)>,
    /// Go on with a stream that was cut short; `receive NAME --resume-token` prints the token
    #[arg(long, value_name = "TOKEN", value_parser = token())]
    pub(crate) resume: Option<Progress>,
    /// How hard to compress (zstd), from 1 to 19
    #[arg(long, value_name = "LEVEL", default_value_t = stream::LEVEL_DEFAULT)]
    #[arg(value_parser = clap::value_parser!(i32).range(LEVELS))]
    pub(crate) level: i32,
    /// Do not compress
    #[arg(long, conflicts_with = "level")]
    pub(crate) no_compress: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ReceiveArgs {
    /// Name of the disk: a new one, unless the stream builds on a snapshot
    #[arg(value_name = "NAME", value_parser = disk())]
    pub(crate) name: String,
    /// Lose what was written to the disk since the snapshot that the stream builds on
    #[arg(long)]
    pub(crate) force: bool,
    /// Read nothing; print what `send --resume` needs to go on with a stream that was cut short
    #[arg(long)]
    pub(crate) resume_token: bool,
}

#[derive(Args, Debug)]
pub(crate) struct MountArgs {
    /// An empty directory
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,
    /// Stay in the foreground; SIGTERM and Ctrl-C unmount
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Said by `mount` to the process that it starts
    #[arg(long, hide = true)]
    pub(crate) detached: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Serve {
    /// The store: a file or block device that `parallax format` prepared
    #[arg(value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) path: PathBuf,
    /// Also serve NBD at unix:/path or tcp:host:port; may be given several times
    ///
    /// The port is 10809 if none is given. IPv6 addresses go in brackets: `tcp:[::1]:10809`. TCP on
    /// anything but loopback needs --tls-dir.
    #[arg(long, value_name = "ADDRESS", value_parser = clap::value_parser!(daemon::NbdAddress))]
    pub(crate) nbd: Vec<daemon::NbdAddress>,
    /// Memory for tree nodes; more of it makes random reads on large disks faster
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size())]
    pub(crate) cache: u64,
    /// Memory that a garbage collection may take for what it knows of blocks
    ///
    /// With 256M it goes once through all disks of a store that holds up to 2 TiB; of a larger one it collects 4 TiB at
    /// a time.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size())]
    pub(crate) gc_memory: u64,
    /// Directory with server-cert.pem and server-key.pem: all TCP clients must use TLS
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) tls_dir: Option<PathBuf>,
    /// TLS clients must show a certificate that ca-cert.pem in the TLS directory signed
    #[arg(long, requires = "tls_dir")]
    pub(crate) tls_client_ca: bool,
    /// Serve TCP without TLS beyond loopback: anybody who reaches the port reads and writes disks
    #[arg(long, conflicts_with = "tls_dir")]
    pub(crate) insecure_plaintext: bool,
    /// Use the page cache: only for file systems without direct I/O
    #[arg(long)]
    pub(crate) buffered: bool,
    /// Read and verify all that is stored again so long after the last time; `off` for never
    ///
    /// See `parallax scrub`. The time is that for which the store is served. A scrub that the end of the daemon
    /// cut short begins anew ten minutes after the next start, and twice as long after each further time; if nothing is known of an earlier one, as after a boot, the first begins after a day.
    #[arg(long, value_name = "PERIOD", default_value = "30d", value_parser = period())]
    pub(crate) scrub_every: Duration,
    /// How much scrub reads in a second; 0 for no limit
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = rate())]
    pub(crate) scrub_rate: u64,
    /// How much to log on stderr
    #[arg(long, value_enum, default_value_t = LogLevel::Info, value_name = "LEVEL")]
    pub(crate) log: LogLevel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogLevel {
    /// What was lost or cannot go on
    Error,
    /// Also what an operator should look at
    Warn,
    /// Also start, stop and clients
    Info,
    /// Also what a developer asks for
    Debug,
    /// Everything
    Trace,
}

fn size() -> ValueParser {
    ValueParser::new(parse_size)
}

/// Bytes in a second, or 0.
fn rate() -> ValueParser {
    ValueParser::new(|text: &str| match text {
        "0" => Ok(0),
        text => parse_size(text),
    })
}

/// Longest time between two scrubs: ten years.
const SCRUB_PERIOD_MAX_SECONDS: u64 = 10 * 365 * 24 * 3600;

/// A period such as 30d, or `off`.
fn period() -> ValueParser {
    ValueParser::new(parse_period)
}

fn parse_period(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is no period: use 12h, 7d or 4w, or off");
    if text == "off" || text == "0" {
        return Ok(Duration::ZERO);
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text.strip_prefix(digits) {
        Some("m") => 60,
        Some("h") => 3600,
        Some("d") => 24 * 3600,
        Some("w") => 7 * 24 * 3600,
        _ => return Err(wrong()),
    };
    let count: u64 = digits.parse().map_err(|_| wrong())?;
    match count.checked_mul(unit) {
        Some(seconds @ 1..=SCRUB_PERIOD_MAX_SECONDS) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("'{text}' is not between a minute and ten years")),
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let bytes = base::size::parse_bytes(text)?;
    if bytes == 0 { Err("a size must be more than 0".to_owned()) } else { Ok(bytes) }
}

/// What a disk is to be resized to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewSize {
    /// This many bytes.
    Bytes(u64),
    /// So many more than it has.
    More(u64),
}

fn new_size() -> ValueParser {
    ValueParser::new(|text: &str| match text.strip_prefix('+') {
        Some(more) => parse_size(more).map(NewSize::More),
        None => parse_size(text).map(NewSize::Bytes),
    })
}

/// What `set` sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Setting {
    /// Which moments are kept by themselves, as the daemon understands it.
    History(String),
}

fn setting() -> ValueParser {
    ValueParser::new(|text: &str| match text.split_once('=') {
        Some(("history", history)) => Ok(Setting::History(history.to_owned())),
        _ => Err("must be history=HISTORY, such as history=24h, history=off or history=inherit"),
    })
}

fn seconds() -> ValueParser {
    ValueParser::new(|text: &str| match text.parse::<f64>() {
        Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("must be a number from 0.1 to 86400"),
    })
}

fn target() -> ValueParser {
    ValueParser::new(split_target)
}

/// A disk or snapshot that goes to the daemon as it was written.
fn handle() -> ValueParser {
    ValueParser::new(|text: &str| split_target(text).map(|_| text.to_owned()))
}

fn disk() -> ValueParser {
    ValueParser::new(|text: &str| match split_target(text)? {
        (name, None) => Ok(name),
        (name, Some(_)) => Err(format!("that is a snapshot; this takes a disk, such as {name}")),
    })
}

fn snapshot_of() -> ValueParser {
    ValueParser::new(|text: &str| match split_target(text)? {
        (name, None) => Ok(name),
        (name, Some(label)) => {
            Err(format!("a label has an option: parallax snapshot {name} --label {label}"))
        }
    })
}

/// Shortest time from one snapshot of a series to the next.
const SPAN_MIN: Duration = Duration::from_micros(10);

/// Longest, and longest time that a series goes on: a year.
const SPAN_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// A length of time, down to microseconds.
fn span() -> ValueParser {
    ValueParser::new(|text: &str| {
        let span = text.parse::<SignedDuration>().ok().and_then(|it| Duration::try_from(it).ok());
        let is_whole = |span: &Duration| span.subsec_nanos().is_multiple_of(1000);
        span.filter(|span| (SPAN_MIN..=SPAN_MAX).contains(span) && is_whole(span)).ok_or(
            "not a time: write 100us, 1ms, 5s or 10m, in whole microseconds, from 10us to a year",
        )
    })
}

/// What zstd can be asked for.
const LEVELS: RangeInclusive<i64> = stream::LEVEL_MIN as i64..=stream::LEVEL_MAX as i64;

/// A snapshot, of the disk that stands elsewhere on the line if it has no name.
fn base() -> ValueParser {
    ValueParser::new(|text: &str| match text.split_once('@') {
        Some((name, snapshot)) if !snapshot.is_empty() => {
            Ok(((!name.is_empty()).then(|| name.to_owned()), snapshot.to_owned()))
        }
        _ => Err("which snapshot? write NAME@SNAPSHOT, or @SNAPSHOT if it is of the same disk"),
    })
}

fn token() -> ValueParser {
    ValueParser::new(|text: &str| {
        Progress::from_token(text)
            .ok_or("that is no token; `parallax receive NAME --resume-token` prints one")
    })
}

fn snapshot_target() -> ValueParser {
    ValueParser::new(|text: &str| match split_target(text)? {
        (name, Some(snapshot)) => Ok((name, snapshot)),
        (name, None) => Err(format!(
            "which snapshot? write {name}@LABEL or {name}@NUMBER; `parallax snapshots {name}` \
             lists them"
        )),
    })
}

fn split_target(text: &str) -> Result<(String, Option<String>), String> {
    let (name, snapshot) = match text.split_once('@') {
        Some((name, snapshot)) => (name, Some(snapshot)),
        None => (text, None),
    };
    if name.is_empty() || snapshot.is_some_and(str::is_empty) {
        return Err("must be NAME or NAME@SNAPSHOT".to_owned());
    }
    Ok((name.to_owned(), snapshot.map(str::to_owned)))
}

/// A format name goes into qemu-img's command line: only what such names are made of.
fn format_name() -> impl TypedValueParser<Value = String> {
    NonEmptyStringValueParser::new().try_map(|text| {
        let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if plain && !text.starts_with('-') {
            Ok(text)
        } else {
            Err("must be a format of qemu-img, such as raw or qcow2")
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn targets_split_at_the_first_at() {
        let check = |text: &str, name: &str, snapshot: Option<&str>| {
            assert_eq!(split_target(text), Ok((name.to_owned(), snapshot.map(str::to_owned))));
        };
        check("web01", "web01", None);
        check("web01@17", "web01", Some("17"));
        check("web01@a@b", "web01", Some("a@b"));
        for bad in ["", "@", "@x", "web01@"] {
            assert!(split_target(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_snapshot_where_a_disk_belongs_is_refused_with_a_hint() {
        let check = |line: &[&str], hint: &str| {
            let said = Cli::try_parse_from(line).unwrap_err().to_string();
            assert!(said.contains(hint), "{line:?}: {said}");
        };
        check(&["parallax", "snapshot", "a@s"], "parallax snapshot a --label s");
        check(&["parallax", "rename", "a@s", "b"], "such as a");
        check(&["parallax", "clone", "a@", "b"], "NAME@SNAPSHOT");
        check(&["parallax", "diff", "a", "b@"], "NAME@SNAPSHOT");
        check(&["parallax", "create", "a", "--size", "-1"], "'-1' is not a size");
    }
}
