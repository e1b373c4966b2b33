//! Scrub and the check of a store in use among the other operations, and what they must find and must not.

use std::collections::BTreeSet;
use std::rc::Rc;

use base::ErrorKind;
use vdi::check::{CheckReport, FindingKind};
use vdi::{DamageKind, ScrubEnd, ScrubReport};

use crate::random::Random;
use crate::session::{Reach, Session};

/// Runs a pass while clients go on, slowly or not.
pub async fn scrub(session: &Session, random: &mut Random) {
    let rate = if random.chance(500) { 0 } else { random.between(1 << 20, 256 << 20) };
    let pass = session.store.begin_scrub(Some(rate));
    if random.chance(50) {
        session.store.stop_scrub();
    }
    let report = session.store.scrubbed(pass).await;
    judge(session, &report);
    if report.end == ScrubEnd::Finished {
        session.world.probe("scrub: finished");
    }
}

/// Runs a pass while nobody does anything; the blocks that it found to be damaged, or `None` if it has
/// not read everything.
pub async fn quietly(session: Rc<Session>) -> Option<BTreeSet<u64>> {
    session.world.device.arm(false);
    // What only the log names is not scrubbed yet.
    if let Err(error) = session.store.checkpoint().await {
        session.world.trace.note(|| format!("scrub    without a checkpoint: {error}"));
        return None;
    }
    let report = session.store.scrubbed(session.store.begin_scrub(Some(0))).await;
    judge(&session, &report);
    let is_complete = report.end == ScrubEnd::Finished && report.damages_omitted == 0;
    let blocks = report
        .damages
        .iter()
        .flat_map(|damage| (0..damage.block_count).map(|index| damage.at.plus(index).get()));
    is_complete.then(|| blocks.collect())
}

/// Checks the store while clients go on.
pub async fn check(session: &Session, random: &mut Random) {
    let rate = random.between(1 << 20, 256 << 20);
    match session.store.check(random.chance(300), Some(rate), Vec::new(), |_| {}).await {
        Ok(report) => {
            judge_check(session, &report);
            session.world.probe("check: online");
        }
        // Somebody needed space, or stopped the pass that was to read the data.
        Err(error) if error.kind() == ErrorKind::Busy => session.world.probe("check: gave way"),
        Err(error) => session.excuse("check", error.kind(), &error, Reach::Metadata),
    }
}

/// A store to which nothing was done is sound, whatever its clients do.
fn judge_check(session: &Session, report: &CheckReport) {
    let world = &session.world;
    world.trace.note(|| format!("check    {:?} {:?}", report.counts, report.errors));
    let is_hit = world.device.with_atlas(|atlas| atlas.damaged > 0 || atlas.cache_losses > 0);
    if is_hit || session.before().errors_since(world) {
        return;
    }
    // Copies rot at crashes.
    let is_copy = |kind| matches!(kind, FindingKind::Superblock | FindingKind::HostSlot);
    if let Some(finding) = report.errors.iter().find(|finding| !is_copy(finding.kind)) {
        world.fail(format!("the check of a store in use calls this damage: {finding:?}"));
    }
}

/// Every block that is called damaged is.
fn judge(session: &Session, report: &ScrubReport) {
    let world = &session.world;
    world.trace.note(|| format!("scrub    {report:?}"));
    let before = session.before();
    let errors = before.errors_since(world);
    if let ScrubEnd::Failed(why) = &report.end
        && !errors
        && !world.device.with_atlas(|atlas| atlas.damaged > 0)
        && !session.stopped()
    {
        world.fail(format!("scrub failed ({why}), which nothing explains"));
    }
    for damage in &report.damages {
        world.probe("scrub: found damage");
        for index in 0..damage.block_count {
            let pba = damage.at.plus(index).get();
            let is_explained = world.device.with_atlas(|atlas| atlas.was_damaged(pba))
                || (damage.is_unreadable && errors)
                || before.cache_lost_since(world);
            if !is_explained {
                world.fail(format!("scrub calls block {pba} damaged, which is not: {damage:?}"));
            }
        }
        if damage.owners.is_empty() && !matches!(damage.kind, DamageKind::Table(_)) {
            world.fail(format!("scrub does not say whose this is: {damage:?}"));
        }
    }
}

/// What the offline check found of what is published that scrub did not.
#[must_use]
pub fn missed(report: &CheckReport, found: &BTreeSet<u64>) -> Option<String> {
    let is_scrubbed = |message: &str| {
        // The log is verified when it is replayed, the older slot when the newer one fails; and what was
        // given up may be readable again.
        !["log record", "older", "given up"].iter().any(|other| message.contains(other))
    };
    let damage = report.errors.iter().filter(|finding| {
        matches!(finding.kind, FindingKind::Data | FindingKind::Metadata)
            && is_scrubbed(&finding.message)
    });
    let missed = |at: base::Pba| !found.contains(&at.get());
    damage.filter(|finding| finding.at.is_some_and(missed)).map(|it| it.message.clone()).next()
}
