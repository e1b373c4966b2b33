//! The handshake without TLS.

use std::rc::Rc;
use std::time::Duration;

use disk::MemDisk;
use nbd::Config;
use nbd::protocol::handshake::{self, ClientFlags, Info, info, option, reply};
use nbd::protocol::request::Command;
use nbd::protocol::{BASE_ALLOCATION, BASE_ALLOCATION_ID, Framing, error, transmission};
use runtime::Order;

use crate::client::{Client, Closed};
use crate::harness::{Harness, TestCatalog};

/// Runs `test` with a client past the greeting.
fn greeted<F: Future<Output = ()> + 'static>(catalog: TestCatalog, test: impl FnOnce(Client) -> F) {
    let harness = Harness::new(catalog);
    let socket = harness.connect(1 << 20);
    let client = harness.run(Client::greet(socket));
    harness.run(test(client));
}

fn one() -> TestCatalog {
    TestCatalog::memory(1 << 20)
}

fn disk() -> Rc<MemDisk> {
    Rc::new(MemDisk::new(4096))
}

fn text(reply: &(u32, Vec<u8>)) -> &str {
    std::str::from_utf8(&reply.1).unwrap()
}

#[test]
fn export_name_with_and_without_padding() {
    for no_zeroes in [true, false] {
        let harness = Harness::new(one());
        let socket = harness.connect(1000);
        harness.run(async move {
            let mut client = Client::new(socket);
            client.receive(18).await.unwrap();
            let mut out = Vec::new();
            // Old clients send the option without waiting and without fixed newstyle.
            ClientFlags { fixed_newstyle: false, no_zeroes }.encode(&mut out);
            handshake::encode_option(option::EXPORT_NAME, b"d", &mut out);
            client.send(out).await;
            let answer = client.receive(if no_zeroes { 10 } else { 134 }).await.unwrap();
            assert_eq!(answer[..8], (1u64 << 20).to_be_bytes());
            let flags = u16::from_be_bytes([answer[8], answer[9]]);
            assert_eq!(flags & transmission::SEND_DF, 0);
            assert!(answer[10..].iter().all(|&byte| byte == 0));
            assert_eq!(client.read(0, 3).await.data, [0; 3]);
        });
    }
}

#[test]
fn an_export_name_that_leads_nowhere_ends_the_session() {
    greeted(one(), |mut client| async move {
        let mut out = Vec::new();
        handshake::encode_option(option::EXPORT_NAME, b"x", &mut out);
        client.send(out).await;
        assert!(client.is_closed().await);
    });
}

#[test]
fn unknown_handshake_flags_end_the_session() {
    let harness = Harness::new(one());
    let socket = harness.connect(1000);
    harness.run(async move {
        let mut client = Client::new(socket);
        client.receive(18).await.unwrap();
        client.send(vec![0, 0, 0, 7]).await;
        assert!(client.is_closed().await);
    });
    assert_eq!(harness.server.metrics().handshakes_failed, 1);
}

#[test]
fn options_without_fixed_newstyle_end_the_session() {
    let harness = Harness::new(one());
    let socket = harness.connect(1000);
    harness.run(async move {
        let mut client = Client::new(socket);
        client.exchange_greeting(false).await;
        assert_eq!(client.option(option::LIST, &[]).await, Err(Closed));
    });
}

#[test]
fn abort_is_acknowledged() {
    greeted(one(), |mut client| async move {
        let replies = client.option(option::ABORT, b"ignored").await;
        assert_eq!(replies, Ok(vec![(reply::ACK, vec![])]));
        assert!(client.is_closed().await);
    });
}

#[test]
fn unknown_options_are_refused_politely() {
    greeted(one(), |mut client| async move {
        for option in [0, 4, 12, 0xdead_beef] {
            let replies = client.option(option, &[1, 2, 3]).await.unwrap();
            assert_eq!(replies[0].0, reply::ERR_UNSUP);
        }
        let replies = client.option(option::STARTTLS, &[]).await.unwrap();
        assert_eq!(replies[0].0, reply::ERR_POLICY, "TLS is not configured");
        client.go("d").await;
    });
}

#[test]
fn large_options_are_refused_and_huge_ones_end_the_session() {
    greeted(one(), |mut client| async move {
        let replies = client.option(option::GO, &vec![0; 65_537]).await.unwrap();
        assert_eq!(replies[0].0, reply::ERR_TOO_BIG);
        let mut out = Vec::new();
        handshake::encode_option(option::GO, &[], &mut out);
        out[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
        client.send(out).await;
        assert!(client.is_closed().await);
    });
}

#[test]
fn a_client_cannot_haggle_for_ever() {
    greeted(one(), |mut client| async move {
        for _ in 0..1000 {
            client.option(99, &[]).await.unwrap();
        }
        assert!(client.is_closed().await);
    });
}

#[test]
fn exports_are_listed_in_pages_with_descriptions() {
    let mut catalog =
        TestCatalog::default().add("a@snap", Rc::new(MemDisk::read_only(vec![0; 8192])));
    for number in 0..600 {
        catalog = catalog.add(&format!("vdi{number:04}"), disk());
    }
    let lists = Rc::clone(&catalog.lists);
    greeted(catalog, |mut client| async move {
        let replies = client.option(option::LIST, &[]).await.unwrap();
        assert_eq!(replies.len(), 602);
        let (name, description) = handshake::decode_server(&replies[0].1).unwrap();
        assert_eq!((name, description), ("a@snap", "8 KiB, read-only snapshot"));
        let (name, description) = handshake::decode_server(&replies[600].1).unwrap();
        assert_eq!((name, description), ("vdi0599", "4 KiB"));
        let replies = client.option(option::LIST, b"x").await.unwrap();
        assert_eq!(replies[0].0, reply::ERR_INVALID);
    });
    assert_eq!(lists.get(), 4, "three pages of 256 and the end");
}

#[test]
fn a_list_is_bounded() {
    let mut catalog = TestCatalog::default();
    let disk = disk();
    for number in 0..10_500 {
        catalog = catalog.add(&format!("{number}"), Rc::<MemDisk>::clone(&disk));
    }
    greeted(catalog, |mut client| async move {
        let replies = client.option(option::LIST, &[]).await.unwrap();
        assert_eq!(replies.len(), 10_001);
    });
}

#[test]
fn info_tells_everything_and_go_starts() {
    let catalog = TestCatalog::default().add("d@s", Rc::new(MemDisk::read_only(vec![0; 3 << 20])));
    greeted(catalog, |mut client| async move {
        let all = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, info::EXPORT, 77];
        for option in [option::INFO, option::GO] {
            let replies = client.export_option(option, "d@s", &all).await;
            let (last, infos) = replies.split_last().unwrap();
            assert_eq!(*last, (reply::ACK, vec![]));
            let infos: Vec<_> =
                infos.iter().map(|(_, data)| Info::decode(data).unwrap().unwrap()).collect();
            let flags = transmission::HAS_FLAGS
                | transmission::READ_ONLY
                | transmission::SEND_FLUSH
                | transmission::SEND_FUA
                | transmission::CAN_MULTI_CONN
                | transmission::SEND_CACHE;
            let expected = [
                Info::Export { size: 3 << 20, flags },
                Info::BlockSize { minimum: 1, preferred: 4096, payload_max: 32 << 20 },
                Info::Name("d@s"),
                Info::Description("3 MiB, read-only snapshot"),
            ];
            assert_eq!(infos, expected);
        }
        assert_eq!(client.read(0, 1).await.data, [0]);
    });
}

#[test]
fn info_and_go_refuse_what_makes_no_sense() {
    greeted(one(), |mut client| async move {
        for option in [option::INFO, option::GO] {
            let replies = client.export_option(option, "nobody", &[]).await;
            assert_eq!(replies[0].0, reply::ERR_UNKNOWN);
            assert_eq!(text(&replies[0]), "there is no such disk");
            for data in [&b""[..], &[0, 0, 0, 9, b'd', 0, 0], &[0, 0, 0, 1, b'd', 0, 1]] {
                let replies = client.option(option, data).await.unwrap();
                assert_eq!(replies[0].0, reply::ERR_INVALID);
            }
        }
        client.go("d").await;
        assert_eq!(client.size, 1 << 20);
        let expected = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::CAN_MULTI_CONN
            | transmission::SEND_CACHE
            | transmission::SEND_TRIM
            | transmission::SEND_WRITE_ZEROES
            | transmission::SEND_FAST_ZERO;
        assert_eq!(client.flags, expected);
    });
}

#[test]
fn the_empty_name_is_the_only_vdi() {
    let mut catalog = TestCatalog::default().add("web", disk());
    for number in 0..100 {
        catalog = catalog.add(&format!("web@{number}"), disk());
    }
    let lists = Rc::clone(&catalog.lists);
    greeted(catalog, |mut client| async move {
        let replies = client.export_option(option::INFO, "", &[info::NAME]).await;
        let names: Vec<_> = replies
            .iter()
            .filter_map(|(_, data)| match Info::decode(data) {
                Ok(Some(Info::Name(name))) => Some(name.to_owned()),
                _ => None,
            })
            .collect();
        assert_eq!(names, ["web"]);
        client.go("").await;
        assert_eq!(client.size, 4096);
    });
    assert!(lists.get() <= 4, "snapshots are skipped, not read: {}", lists.get());
}

#[test]
fn the_empty_name_is_refused_with_a_list_of_names() {
    greeted(TestCatalog::default(), |mut client| async move {
        let replies = client.export_option(option::GO, "", &[]).await;
        assert_eq!(replies[0].0, reply::ERR_UNKNOWN);
        assert!(text(&replies[0]).contains("parallax create"), "{}", text(&replies[0]));
    });
    let catalog = TestCatalog::default().add("a", disk()).add("a@1", disk()).add("b", disk());
    greeted(catalog, |mut client| async move {
        let replies = client.export_option(option::GO, "", &[]).await;
        assert_eq!(replies[0].0, reply::ERR_UNKNOWN);
        assert_eq!(text(&replies[0]), "give the name of an export, one of: a, b");
    });
    let mut many = TestCatalog::default();
    for number in 0..50 {
        many = many.add(&format!("v{number:02}"), disk()).add(&format!("v{number:02}@1"), disk());
    }
    greeted(many, |mut client| async move {
        let replies = client.export_option(option::GO, "", &[]).await;
        let expected = "one of: v00, v01, v02, v03, v04, v05, v06, v07, ...";
        assert!(text(&replies[0]).ends_with(expected), "{}", text(&replies[0]));
    });
}

#[test]
fn framing_is_agreed_in_this_order_only() {
    greeted(one(), |mut client| async move {
        for option in [option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
            let replies = client.option(option, b"x").await.unwrap();
            assert_eq!(replies[0].0, reply::ERR_INVALID);
        }
        client.set_framing(Framing::Structured).await;
        client.set_framing(Framing::Structured).await;
        client.set_framing(Framing::Extended).await;
        let replies = client.option(option::STRUCTURED_REPLY, &[]).await.unwrap();
        assert_eq!(replies[0].0, reply::ERR_EXT_HEADER_REQD);
        let mut out = Vec::new();
        handshake::encode_option(option::EXPORT_NAME, b"d", &mut out);
        client.send(out).await;
        assert!(client.is_closed().await, "extended headers exclude EXPORT_NAME");
    });
}

#[test]
fn metadata_contexts_are_listed_and_selected() {
    greeted(one().add("e", disk()), |mut client| async move {
        let (list, set) = (option::LIST_META_CONTEXT, option::SET_META_CONTEXT);
        for option in [list, set] {
            let replies = client.contexts(option, "d", &[]).await;
            assert_eq!(replies[0].0, reply::ERR_INVALID, "structured replies come first");
        }
        client.set_framing(Framing::Structured).await;
        let context = |id: u32| {
            (reply::META_CONTEXT, {
                let mut data = Vec::new();
                handshake::encode_context(id, BASE_ALLOCATION, &mut data);
                data
            })
        };
        let ack = (reply::ACK, vec![]);
        for (option, queries, expected) in [
            (list, vec![], Some(0)),
            (list, vec!["base:"], Some(0)),
            (list, vec!["x:y", BASE_ALLOCATION, BASE_ALLOCATION], Some(0)),
            (list, vec!["x:"], None),
            (list, vec!["base:other"], None),
            (set, vec![], None),
            (set, vec!["base:"], None),
            (set, vec!["qemu:allocation-depth"], None),
            (set, vec!["x:y", BASE_ALLOCATION], Some(BASE_ALLOCATION_ID)),
        ] {
            let replies = client.contexts(option, "d", &queries).await;
            let expected: Vec<_> = expected.map(context).into_iter().chain([ack.clone()]).collect();
            assert_eq!(replies, expected, "{option} {queries:?}");
        }
        let replies = client.contexts(set, "nobody", &[BASE_ALLOCATION]).await;
        assert_eq!(replies[0].0, reply::ERR_UNKNOWN);
        let replies = client.option(set, b"garbage").await.unwrap();
        assert_eq!(replies[0].0, reply::ERR_INVALID);
        client.go("d").await;
        let answer = client.request(Command::BlockStatus, 0, 0, 4096).await;
        assert_eq!(answer.error, error::EINVAL, "a failed selection selects nothing");
    });
}

#[test]
fn contexts_count_for_their_export_only() {
    for (selected, expected) in [("d", 0), ("e", error::EINVAL)] {
        greeted(one().add("e", disk()), |mut client| async move {
            client.set_framing(Framing::Extended).await;
            client.set_allocation(selected).await;
            client.go("d").await;
            let answer = client.request(Command::BlockStatus, 0, 0, 4096).await;
            assert_eq!(answer.error, expected);
            let payload = client.flags & transmission::BLOCK_STATUS_PAYLOAD;
            assert_eq!(payload != 0, expected == 0);
        });
    }
}

#[test]
fn a_handshake_must_end_in_time() {
    let config = Config { handshake_timeout: Duration::from_secs(5), ..Config::default() };
    for greet in [false, true] {
        let harness = Harness::with(one(), config.clone(), Order::Fifo, 1);
        let socket = harness.connect(1000);
        let runtime = harness.runtime.clone();
        harness.run(async move {
            let mut client = Client::new(socket);
            if greet {
                client.exchange_greeting(true).await;
                // A byte now and then does not help.
                for _ in 0..4 {
                    runtime.sleep(Duration::from_secs(1)).await;
                    client.send(vec![b'I']).await;
                }
            } else {
                client.receive(18).await.unwrap();
            }
            assert!(client.is_closed().await);
            assert_eq!(runtime.now().0, 5_000_000_000);
        });
        assert_eq!(harness.server.metrics().handshakes_failed, 1);
    }
}

#[test]
fn a_client_that_does_not_read_the_handshake_is_cut_off_too() {
    let harness = Harness::new(one());
    let socket = harness.connect(5);
    harness.run(async move {
        let mut client = Client::new(socket);
        assert_eq!(client.receive(100).await, Err(Closed));
    });
}

#[test]
fn connections_are_bounded() {
    let config = Config { connections_max: 2, ..Config::default() };
    let harness = Harness::with(one(), config, Order::Fifo, 1);
    let [first, second, third] = [(); 3].map(|()| harness.connect(1000));
    let clients = harness.run(async move {
        let clients = [Client::greet(first).await, Client::greet(second).await];
        assert!(Client::new(third).is_closed().await);
        clients
    });
    drop(clients);
    harness.settle();
    let again = harness.connect(1000);
    harness.run(Client::greet(again));
    let metrics = harness.server.metrics();
    assert_eq!((metrics.connections, metrics.connections_refused), (4, 1));
}

#[test]
fn what_a_client_sends_ahead_is_not_lost() {
    let harness = Harness::new(one());
    let socket = harness.connect(1 << 20);
    harness.run(async move {
        let mut client = Client::greet(socket).await;
        let mut out = Vec::new();
        let mut data = Vec::new();
        handshake::ExportRequest { name: "d", infos: vec![] }.encode(&mut data);
        handshake::encode_option(option::GO, &data, &mut out);
        let read = nbd::protocol::request::Header {
            flags: 0,
            command: Command::Read.to_wire(),
            cookie: 5,
            offset: 0,
            length: 10,
        };
        read.encode(Framing::Simple, &mut out);
        client.send(out).await;
        client.receive(20 + 12 + 20 + 14 + 20).await.unwrap();
        assert_eq!(client.read_answer(0, 10).await.unwrap().cookie, 5);
    });
}
