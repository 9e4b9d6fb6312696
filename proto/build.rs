//! Compiles the contracts without protoc and keeps their descriptors for gRPC reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const FILES: [&str; 3] = ["emu2/v1/tensor.proto", "emu2/v1/emu2.proto", "emu2/stage/v1/stage.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("emu2.descriptors"), descriptors.encode_to_vec())?;
    // `Bytes` for every bytes field: images and tensors are shared, not copied, on decode.
    tonic_prost_build::configure().bytes(".").codec_path("crate::codec::Codec").compile_fds(descriptors)?;
    println!("cargo:rerun-if-changed=emu2");
    Ok(())
}
