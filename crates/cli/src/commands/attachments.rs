//! Commands on attachments: attach, detach, attachments.

use std::path::Path;

use api::{Attach, Attachment, Error, Kind};

use super::Context;
use crate::output::{self, Column};

pub(super) async fn attach(
    context: &Context,
    (name, snapshot): (String, Option<String>),
    vhost_user: Option<&Path>,
) -> Result<(), Error> {
    let disk = match snapshot {
        Some(snapshot) => format!("{name}@{snapshot}"),
        None => name,
    };
    let vhost_user = vhost_user.map(absolute).transpose()?;
    let request = Attach { disk, ublk: vhost_user.is_none(), vhost_user };
    let attachment = context.client.attach(&request).await?;
    let text = format!("attached {} at {}", attachment.disk, attachment.path());
    context.print(&attachment, &text)
}

pub(super) async fn detach(context: &Context, path: &Path) -> Result<(), Error> {
    let attachment = context.client.detach(&absolute(path)?).await?;
    let text = format!("detached {} from {}", attachment.disk, attachment.path());
    context.print(&attachment, &text)
}

pub(super) async fn list(context: &Context) -> Result<(), Error> {
    let attachments = context.client.attachments().await?;
    if context.json {
        return output::print_json(&attachments);
    }
    if attachments.is_empty() {
        let hint = "no disk is attached; attach one with: parallax attach NAME --vhost-user PATH, or \
                    parallax attach NAME --ublk";
        return output::print(hint);
    }
    let columns = [Column::Left("DISK"), Column::Left("CONNECTED"), Column::Left("AT")];
    let row = |attachment: Attachment| {
        let connected = if attachment.connected { "yes" } else { "no" };
        let at = attachment.path().to_owned();
        vec![attachment.disk, connected.to_owned(), at]
    };
    output::print(&output::table(&columns, attachments.into_iter().map(row).collect()))
}

/// The daemon has another working directory.
pub(super) fn absolute(path: &Path) -> Result<String, Error> {
    let shown = path.display();
    let path = std::path::absolute(path)
        .map_err(|e| Error::system(&format!("find out where {shown} is"), &e))?;
    path.into_os_string()
        .into_string()
        .map_err(|_| Error::new(Kind::Invalid, format!("{shown}: the path must be UTF-8 text")))
}
