//! The control plane: HTTP and JSON over a unix socket, on its own thread. Each request becomes
//! one call to the engine thread; nothing here touches the store.
//!
//! The routes are listed in `api`.

mod extract;
mod routes;

use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::current::Current;

/// Serves until `stop` says so, then ends as soon as the requests under way are answered.
pub(crate) async fn serve(
    listener: UnixListener,
    current: Current,
    mut stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    axum::serve(listener, routes::router(current))
        .with_graceful_shutdown(async move {
            // A dropped sender means the same.
            let _ = stop.wait_for(|&stop| stop).await;
        })
        .await
}
