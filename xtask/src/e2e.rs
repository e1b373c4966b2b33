//! `cargo xtask e2e`: real clients, real kernels and real crashes against the real daemon.
//!
//! Every scenario runs against one server of its own, in directories of its own. With `--peer`
//! they run against qemu-storage-daemon instead, as far as it can do what they ask: a harness
//! that finds faults in a server that is known to be good is itself at fault.

mod churn;
mod clones;
mod crash;
mod debian;
mod filesystems;
mod fio_matrix;
mod forks;
mod full;
mod guest;
mod guides;
mod initramfs;
mod kernel;
mod ledger;
mod migration;
mod mounted;
mod quickstart;
mod tools;
mod ublk;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::clock;
use crate::console::{self, Heading};
use crate::gate::Count;
use crate::packages;
use crate::random::Random;
use crate::server::{Kind, Options, Server};
use crate::workspace::Workspace;

/// One scenario.
struct Scenario {
    name: &'static str,
    /// Whether the gate runs it, in its short form.
    quick: bool,
    /// Whether it boots guests.
    guests: bool,
    run: fn(&mut Bed) -> Result<()>,
}

const SCENARIOS: [Scenario; 23] = [
    Scenario { name: "quickstart", quick: true, guests: false, run: quickstart::run },
    Scenario { name: "tools", quick: true, guests: false, run: tools::run },
    Scenario { name: "fio", quick: true, guests: false, run: fio_matrix::run },
    Scenario { name: "crash", quick: true, guests: false, run: crash::run },
    Scenario { name: "full", quick: true, guests: false, run: full::run },
    Scenario { name: "full-storms", quick: true, guests: false, run: crash::full },
    Scenario { name: "churn", quick: true, guests: false, run: churn::run },
    Scenario { name: "mount", quick: true, guests: false, run: mounted::run },
    Scenario { name: "guest-ext4", quick: false, guests: true, run: filesystems::ext4 },
    Scenario { name: "guest-xfs", quick: false, guests: true, run: filesystems::xfs },
    Scenario { name: "guest-btrfs", quick: false, guests: true, run: filesystems::btrfs },
    Scenario { name: "guest-vhost", quick: false, guests: true, run: filesystems::vhost_user },
    Scenario { name: "guest-migration", quick: false, guests: true, run: migration::run },
    Scenario { name: "ublk", quick: false, guests: true, run: ublk::run },
    Scenario { name: "clones", quick: false, guests: true, run: clones::run },
    Scenario { name: "forks", quick: false, guests: true, run: forks::run },
    Scenario { name: "guide-host", quick: true, guests: false, run: guides::host },
    Scenario { name: "guide-time-travel", quick: true, guests: false, run: guides::time_travel },
    Scenario { name: "guide-backup", quick: true, guests: false, run: guides::backup::run },
    Scenario { name: "guide-qemu", quick: false, guests: true, run: guides::qemu },
    Scenario { name: "guide-libvirt", quick: false, guests: true, run: guides::libvirt },
    Scenario {
        name: "guide-cloud-hypervisor",
        quick: false,
        guests: true,
        run: guides::cloud_hypervisor,
    },
    Scenario { name: "guide-firecracker", quick: false, guests: true, run: guides::firecracker },
];

/// How much is done.
#[derive(Default)]
struct Form {
    /// Short form, for the gate.
    quick: bool,
    /// Instead of fresh seeds.
    seed: Option<u64>,
    /// Instead of the rounds that a scenario would do.
    rounds: Option<u64>,
}

/// Where a scenario runs, and what it found.
pub(crate) struct Bed {
    /// The server to test.
    kind: Kind,
    /// Short form, for the gate.
    quick: bool,
    /// How often to do what is done again and again, if the caller has an opinion.
    rounds: Option<u64>,
    /// Large files of this scenario; gone when it has passed.
    data: PathBuf,
    /// Sockets and logs of this scenario; gone when it has passed.
    scratch: PathBuf,
    /// What outlives a run: a kernel, a root file system.
    cache: PathBuf,
    /// The scenario's choices; the seed is printed.
    random: Random,
    count: Count,
}

/// One step of a story; what comes after one that failed cannot be told.
type Step<S> = (&'static str, fn(&mut S) -> Result<()>);

/// Runs the scenarios asked for, or all.
///
/// # Errors
/// If any check fails.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<()> {
    let mut form = Form::default();
    let mut peer = false;
    let mut binary = None;
    let mut names = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--quick" => form.quick = true,
            "--peer" => peer = true,
            "--seed" => form.seed = Some(number(argument, rest.next())?),
            "--rounds" => form.rounds = Some(number(argument, rest.next())?),
            "--binary" => {
                binary = Some(PathBuf::from(rest.next().context("--binary takes a path")?))
            }
            name if SCENARIOS.iter().any(|scenario| scenario.name == name) => names.push(name),
            other => bail!(
                "e2e does not know '{other}': [--quick] [--peer] [--binary PATH] [--seed N] \
                 [--rounds N] [scenario…]; the scenarios are {}",
                SCENARIOS.map(|scenario| scenario.name).join(", ")
            ),
        }
    }
    let chosen = |scenario: &&Scenario| match names.is_empty() {
        true => !form.quick || scenario.quick,
        false => names.contains(&scenario.name),
    };
    let kind = match peer {
        true => Kind::Raw,
        false => Kind::Parallax(workspace.parallax(binary.as_deref())?),
    };
    let scenarios: Vec<&Scenario> = SCENARIOS.iter().filter(chosen).collect();
    let count = scenarios_on(workspace, &kind, &form, &scenarios)?;
    console::say(&format!("{} passed, {} failed", count.passed, count.failed));
    ensure!(count.failed == 0, "{} end-to-end checks failed", count.failed);
    Ok(())
}

/// What the scenarios are called.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    SCENARIOS.iter().map(|scenario| scenario.name)
}

/// The gate's part: the quick scenarios in their short form.
///
/// # Errors
/// If a scenario cannot be run at all.
pub(crate) fn quick(workspace: &Workspace) -> Result<Count> {
    let kind = Kind::Parallax(workspace.parallax(None)?);
    let quick: Vec<&Scenario> = SCENARIOS.iter().filter(|scenario| scenario.quick).collect();
    scenarios_on(workspace, &kind, &Form { quick: true, ..Form::default() }, &quick)
}

/// The number that follows an option.
fn number(option: &str, given: Option<&String>) -> Result<u64> {
    given.and_then(|text| text.parse().ok()).with_context(|| format!("{option} takes a number"))
}

fn scenarios_on(
    workspace: &Workspace,
    kind: &Kind,
    form: &Form,
    scenarios: &[&Scenario],
) -> Result<Count> {
    let guests = scenarios.iter().any(|scenario| scenario.guests);
    packages::ensure(if guests { packages::Use::Everything } else { packages::Use::Gate })?;
    let mut total = Count::default();
    for scenario in scenarios {
        let heading = Heading::new(&format!("e2e {}", scenario.name));
        let seed = form.seed.unwrap_or_else(Random::fresh_seed);
        console::say(&format!("replay with: cargo xtask e2e {} --seed {seed}", scenario.name));
        let name = format!("{}-{}", scenario.name, std::process::id());
        let mut bed = Bed {
            kind: kind.clone(),
            quick: form.quick,
            rounds: form.rounds,
            data: workspace.target.join("e2e").join(&name),
            scratch: std::env::temp_dir().join(format!("parallax-e2e-{name}")),
            cache: workspace.target.join("guest"),
            random: Random::new(seed),
            count: Count::default(),
        };
        for directory in [&bed.data, &bed.scratch, &bed.cache] {
            std::fs::create_dir_all(directory)?;
        }
        if let Err(error) = (scenario.run)(&mut bed) {
            console::error(&format!("{error:#}"));
            bed.count.failed += 1;
        }
        // Gigabytes: gone in any case. Logs stay after a failure.
        std::fs::remove_dir_all(&bed.data)?;
        if bed.count.failed == 0 {
            std::fs::remove_dir_all(&bed.scratch)?;
            heading.done(&format!("{} passed", bed.count.passed));
        } else {
            console::say(&format!("logs: {}", bed.scratch.display()));
            heading.done(&format!("{} FAILED", bed.count.failed));
        }
        total.passed += bed.count.passed;
        total.failed += bed.count.failed;
    }
    Ok(total)
}

impl Bed {
    /// A server with a disk of this size.
    fn server(&self, disk_bytes: u64) -> Result<Server> {
        self.server_with(&Options::disk(disk_bytes))
    }

    fn server_with(&self, options: &Options) -> Result<Server> {
        Server::create(&self.kind, options, &self.data, &self.scratch)
    }

    /// An example program of ours, built now.
    fn example(&self, package: &str, name: &str) -> Result<PathBuf> {
        Workspace::find()?.release_example(package, name)
    }

    /// How often to do what a scenario does again and again.
    fn rounds(&self, quick: u64, full: u64) -> u64 {
        self.rounds.unwrap_or(if self.quick { quick } else { full })
    }

    /// Our binary; `None` when the peer is tested.
    fn parallax(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Parallax(binary) => Some(binary),
            Kind::Raw | Kind::Qcow2 => None,
        }
    }

    /// Runs the steps of a story with one server, until one fails.
    fn tell<S>(
        &mut self,
        story: &mut S,
        steps: &[Step<S>],
        server: impl Fn(&mut S) -> &mut Server,
    ) {
        for (name, step) in steps {
            if self.count.failed == 0 {
                self.check(name, || {
                    let done = step(story);
                    server(story).explain(done)
                });
            }
        }
    }

    /// Runs one check, says how it went and counts it; a failed one does not end the scenario.
    fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        let start = clock::now();
        let result = check();
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                self.count.passed += 1;
                console::say(&format!("  pass {name} ({seconds:.1} s)"));
            }
            Err(error) => {
                self.count.failed += 1;
                console::say(&format!("  FAIL {name} ({seconds:.1} s)"));
                console::error(&format!("{name}: {error:#}"));
            }
        }
    }
}
