//! Every kind of image that Pillow reads is read as Pillow reads it, through gRPC: its embeddings are those of
//! Pillow's pixels.

use std::{fs, path::PathBuf};

use emu2_proto::{array::Array, v1};
use serde_json::Value;

use crate::support::{rgb_png, shared};

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/images").join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

async fn embeddings(bytes: Vec<u8>) -> Result<Vec<f32>, tonic::Status> {
    let image = Some(v1::Image { data: bytes.into() });
    let request = v1::EmbedRequest { model: "emu2".to_owned(), image, n_query: None, ..Default::default() };
    let response = shared().client().await.embed(request).await?.into_inner();
    Ok(Array::try_from(response.embeddings).unwrap().values().collect())
}

#[tokio::test]
async fn images_of_every_kind_are_read_as_pillow_reads_them() {
    let manifest: Value = serde_json::from_slice(&fixture("manifest.json")).unwrap();
    let cases = manifest["decode"].as_array().unwrap();
    assert!(cases.len() > 100, "{} cases", cases.len());
    for case in cases {
        let name = case["file"].as_str().unwrap();
        let side = |key: &str| case[key].as_u64().unwrap() as u32;
        let pillows = rgb_png(side("width"), side("height"), fixture(case["expected"].as_str().unwrap()));
        let got = embeddings(fixture(name)).await.unwrap_or_else(|status| panic!("{name}: {status}"));
        let want = embeddings(pillows).await.unwrap();
        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Equal pixels; what remains is the rounding of other batches.
        assert!(got.len() == want.len() && worst < 1e-4, "{name}: differs by {worst}");
    }
}
