//! An engine with real sockets, which all inputs of a target share.

use runtime::Runtime;
use runtime::reactor::{EngineChoice, Io, Reactor};

/// Runs what `play` makes of it to its end.
pub fn run<F: Future<Output = ()> + 'static>(play: impl FnOnce(Runtime, Io) -> F) {
    thread_local! {
        static REACTOR: Reactor = Reactor::start(EngineChoice::Auto).expect("an engine");
    }
    REACTOR.with(|reactor| {
        let (runtime, io) = (reactor.runtime().clone(), reactor.io().clone());
        reactor.run(play(runtime, io)).expect("the engine runs");
    });
}
