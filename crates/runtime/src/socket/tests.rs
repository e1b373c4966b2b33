use super::*;
use crate::{Clock, Options, Order, Runtime, Time};
use std::sync::Arc;

struct NoClock;

impl Clock for NoClock {
    fn now(&self) -> Time {
        Time(0)
    }

    fn wall_ns(&self) -> u64 {
        0
    }
}

#[test]
fn bytes_arrive_in_order_through_a_narrow_pipe() {
    let runtime = Runtime::new(Options {
        order: Order::Random,
        seed: 3,
        clock: Rc::new(NoClock),
        unpark: Arc::new(|| ()),
    });
    let (near, far) = pair(7);
    let sent: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    let message = sent.clone();
    let sending = runtime.spawn(async move {
        let (head, tail) = message.split_at(5_000);
        let tail = BlockSlice::whole(Rc::new(Buffer::from_bytes(tail)));
        let segments = vec![Segment::Bytes(head.to_vec()), Segment::Blocks(tail, 0..5_000)];
        near.send(segments).await.unwrap();
        near.shutdown();
        let error = near.send(vec![Segment::Bytes(vec![1])]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    });
    let received = Rc::new(RefCell::new(Vec::new()));
    let into = Rc::clone(&received);
    drop(runtime.spawn(async move {
        loop {
            let (count, buffer) = far.receive(Buffer::zeroed(1), 100..200).await;
            match count.unwrap() {
                0 => break,
                count => into.borrow_mut().extend_from_slice(&buffer.bytes()[100..100 + count]),
            }
        }
        sending.await;
        into.borrow_mut().push(99);
    }));
    runtime.run_until_stalled();
    let mut expected = sent;
    expected.push(99);
    assert_eq!(*received.borrow(), expected);
}
