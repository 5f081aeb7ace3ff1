//! The addresses: free, taken by a daemon, or taken by something else.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use tonic::transport::Endpoint;

use super::Area;
use crate::{
    config::Config,
    service::wire::inference::{
        ServerMetadataRequest, grpc_inference_service_client::GrpcInferenceServiceClient,
    },
    telemetry::names,
};

/// Longest wait for whoever has an address.
const PATIENCE: Duration = Duration::from_secs(2);

/// Tries the addresses of the settings.
pub(super) async fn look(config: &Config) -> Area {
    let mut area = Area::new("Network");
    let grpc = ("gRPC", "--listen", Some(config.listen));
    let admin = ("admin", "--admin-listen", config.admin_listen);
    for (name, flag, address) in [grpc, admin] {
        let Some(address) = address else {
            area.ok(format!("{name}: off"));
            continue;
        };
        match TcpListener::bind(address) {
            Ok(_) => area.ok(format!("{name}: {address} is free")),
            Err(e) => taken(&mut area, name, flag, address, &e).await,
        }
        if !address.ip().is_loopback() {
            area.warning(
                format!("{name}: {address} is reached from other machines, and nobody has to say who they are"),
                "keep it behind a proxy that asks and encrypts, or listen on 127.0.0.1",
            );
        }
    }
    area
}

async fn taken(area: &mut Area, name: &str, flag: &str, address: SocketAddr, error: &io::Error) {
    let advice = format!("choose another address with {flag}");
    if error.kind() != io::ErrorKind::AddrInUse {
        area.problem(
            format!("{name}: {address} cannot be taken: {error}"),
            advice,
        );
        return;
    }
    let taker = match who(address).await {
        Some(who) => Some(who),
        None => admin_page(address).await,
    };
    match taker {
        Some(who) => area.warning(
            format!("{name}: {address} is taken by {who}"),
            format!("nothing if that is meant; for another daemon, {advice}"),
        ),
        None => area.problem(
            format!("{name}: {address} is taken by another program"),
            advice,
        ),
    }
}

/// The same of an admin address.
async fn admin_page(address: SocketAddr) -> Option<String> {
    let page = crate::cli::http::get(address, "/metrics").await.ok()?;
    page.contains(names::BUILD_INFO)
        .then(|| "introspectd".to_owned())
}

/// The daemon that has the address, if it is one of ours.
async fn who(address: SocketAddr) -> Option<String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?;
    let ask = async {
        let channel = endpoint.connect().await.ok()?;
        let mut client = GrpcInferenceServiceClient::new(channel);
        let answer = client
            .server_metadata(ServerMetadataRequest {})
            .await
            .ok()?;
        Some(answer.into_inner())
    };
    let found = tokio::time::timeout(PATIENCE, ask).await.ok()??;
    (found.name == "introspectd")
        .then(|| format!("introspectd {}", crate::cli::out::clean(&found.version)))
}
