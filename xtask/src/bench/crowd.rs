//! Many clients at once, each with connections of its own.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

use crate::clock;

use super::latency::milliseconds;

/// What the clients did together.
#[derive(Debug)]
pub(crate) struct Crowd<T> {
    /// Seconds from the first to the last.
    pub(crate) seconds: f64,
    /// Milliseconds that each action took, in no order.
    pub(crate) times: Vec<f64>,
    /// What each gave back, in no order.
    pub(crate) made: Vec<T>,
}

impl<T> Crowd<T> {
    /// Actions in a second.
    pub(crate) fn per_second(&self) -> f64 {
        self.times.len() as f64 / self.seconds
    }
}

/// Has `clients` of them carry out `action` once for each of `numbers`, whoever is free the next one.
///
/// # Errors
/// The first of one of them; the others end after what they are at.
pub(crate) fn each<C, T: Send>(
    clients: usize,
    numbers: Range<u32>,
    connect: impl Fn() -> Result<C> + Sync,
    action: impl Fn(&mut C, u32) -> Result<T> + Sync,
) -> Result<Crowd<T>> {
    let next = AtomicU32::new(numbers.start);
    let take = || {
        let more = |number| (number < numbers.end).then_some(number + 1);
        next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()
    };
    let work = || -> Result<Vec<(f64, T)>> {
        let mut client = connect()?;
        let mut done = Vec::new();
        while let Some(number) = take() {
            let start = clock::now();
            let made = action(&mut client, number)?;
            done.push((milliseconds(start.elapsed()), made));
        }
        Ok(done)
    };
    let start = clock::now();
    let worked: Vec<Result<Vec<(f64, T)>>> = std::thread::scope(|scope| {
        let client = || {
            // An error ends the work of all: nothing is left to take.
            work().inspect_err(|_| next.store(numbers.end, Ordering::Relaxed))
        };
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        let panicked = |_| Err(anyhow::anyhow!("a client panicked"));
        clients.into_iter().map(|client| client.join().unwrap_or_else(panicked)).collect()
    });
    let seconds = start.elapsed().as_secs_f64();
    let (mut times, mut made) = (Vec::new(), Vec::new());
    for client in worked {
        for (time, one) in client? {
            times.push(time);
            made.push(one);
        }
    }
    Ok(Crowd { seconds, times, made })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_is_taken_once() {
        let count = |client: &mut u32, number: u32| {
            *client += 1;
            Ok(number)
        };
        let mut crowd = each(4, 10..1010, || Ok(0), count).unwrap();
        crowd.made.sort_unstable();
        assert_eq!(crowd.made, (10..1010).collect::<Vec<_>>());
        assert_eq!(crowd.times.len(), 1000);
        assert!(crowd.per_second() > 0.0);
    }

    #[test]
    fn an_error_ends_the_work() {
        let carried_out = AtomicU32::new(0);
        let fail = |(): &mut (), number: u32| {
            carried_out.fetch_add(1, Ordering::Relaxed);
            anyhow::ensure!(number != 3, "three");
            clock::sleep(std::time::Duration::from_millis(1));
            Ok(())
        };
        let error = each(2, 0..5_000, || Ok(()), fail).unwrap_err();
        assert_eq!(error.to_string(), "three");
        assert!(carried_out.load(Ordering::Relaxed) < 1000);
    }
}
