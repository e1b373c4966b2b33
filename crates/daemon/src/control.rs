//! The control plane: HTTP and JSON over a unix socket, on its own thread. Each request becomes
//! one call to the engine thread; nothing here touches the store.
//!
//! The routes are listed in `api`.

mod extract;
mod routes;

use std::sync::Arc;

use api::DaemonStatus;
use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::engine::EngineHandle;

/// What every route needs.
#[derive(Clone)]
pub(crate) struct Control {
    pub(crate) engine: EngineHandle,
    pub(crate) status: Arc<DaemonStatus>,
}

/// Serves until `stop` says so, then ends as soon as the requests under way are answered.
pub(crate) async fn serve(
    listener: UnixListener,
    control: Control,
    mut stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    axum::serve(listener, routes::router(control))
        .with_graceful_shutdown(async move {
            // A dropped sender means the same.
            let _ = stop.wait_for(|&stop| stop).await;
        })
        .await
}
