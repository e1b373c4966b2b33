//! `parallax log --writes`: writes of a disk that can be opened.

use api::{Error, Write};

use super::Context;
use crate::output::{self, Column, time};

pub(super) async fn run(
    context: &Context,
    name: &str,
    up_to: Option<&str>,
    rows: usize,
) -> Result<(), Error> {
    // As `log` shows it.
    let up_to = up_to.map(|given| match given.split_once('@') {
        Some((disk, moment)) if disk == name => moment,
        _ => given,
    });
    let (list, more) = latest(context, name, up_to, rows).await?;
    if context.json {
        return output::print_json(&list);
    }
    if list.is_empty() {
        return output::print(&match rows {
            0 => "no rows were asked for".to_owned(),
            _ => format!(
                "no write of {name} can be opened: they are kept by a history that begins with 'every write', as of \
                 parallax set {name} history='every write for 10m, 24h', and are listed once they were flushed"
            ),
        });
    }
    output::print(&draw(&list, more, output::width()))
}

/// The latest writes, at most `rows`, and whether there are more before.
async fn latest(
    context: &Context,
    name: &str,
    up_to: Option<&str>,
    rows: usize,
) -> Result<(Vec<Write>, bool), Error> {
    let (mut list, mut before) = (Vec::new(), None);
    while list.len() < rows {
        let mut page = context.client.writes(name, up_to, rows - list.len(), before).await?;
        page.writes.append(&mut list);
        list = page.writes;
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    Ok((list, before.is_some()))
}

/// A table for a terminal of this width.
fn draw(list: &[Write], more: bool, width: Option<u16>) -> String {
    let columns = [
        Column::Left("WRITE"),
        Column::Right("OFFSET"),
        Column::Right("LENGTH"),
        Column::Left("KEPT BY"),
        Column::Left("AT"),
    ];
    let row = |write: &Write| {
        let (offset, length) = (write.offset.to_string(), write.length.to_string());
        vec![write.handle.clone(), offset, length, write.moment.clone(), time(write.time)]
    };
    let table = output::layout(&columns, list.iter().map(row).collect(), width);
    match more {
        false => table,
        true => format!("{table}\n(earlier rows are not shown: --rows COUNT)"),
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    #[test]
    fn tables_fit_the_terminal() {
        let write = |lsn| Write {
            handle: format!("web01@lsn:{lsn}"),
            lsn,
            offset: 1 << 40,
            length: 1 << 20,
            moment: "web01@12345".to_owned(),
            time: Timestamp::from_second(60).unwrap(),
        };
        let writes = [write(4711), write(1_234_567)];
        for width in 60..140 {
            let text = draw(&writes, true, Some(width));
            assert!(text.lines().all(|line| line.chars().count() <= usize::from(width)), "{text}");
            assert!(text.contains("web01@lsn:1234567"), "names stay in one piece: {text}");
        }
        let text = draw(&writes, false, None);
        assert!(text.contains("1099511627776") && text.contains("1970-01-01T00:01:00Z"), "{text}");
    }
}
