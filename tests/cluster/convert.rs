//! A published pickle, converted as a person does it, is the model that it was pickled from.

use std::path::Path;

use emu2_nn::golden;
use emu2_proto::v1;
use emu2_standalone::cluster::ClusterConfig;

use crate::support::{answer, ask, binary, client, golden_png, greedy, image, shared, start, text};

/// A command of `emu2`, which must succeed.
fn emu2(command: &str, paths: &[&Path], options: &[&str]) -> String {
    let ended = binary("emu2").arg(command).args(paths).args(options).output().unwrap();
    let said = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
    assert!(ended.status.success(), "{said}");
    said
}

#[tokio::test]
async fn a_converted_pickle_serves_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let [pickled, converted] = ["pickled", "converted"].map(|name| folder.path().join(name));
    golden::pickled("emu2-chat", &pickled);
    let said = emu2("convert", &[&pickled, &converted], &[]);
    assert!(said.contains("2 shards") && said.contains("checksums.json"), "{said}");
    let said = emu2("convert", &[&pickled, &converted], &[]);
    assert!(said.contains("2 of them verified from an earlier run"), "{said}");

    let inspected = emu2("inspect", &[&converted], &["--digest"]);

    let cluster = start(ClusterConfig::local(vec![converted])).await;
    let (mut native, mut other) = (shared().client().await, client(cluster.addr).await);
    let digests = |models: v1::ListModelsResponse| {
        let model = models.models.into_iter().find(|model| model.name == "emu2-chat").unwrap();
        (model.encoder_digest, model.llm_digest, model.n_query, model.v_query)
    };
    let models = v1::ListModelsRequest {};
    let want = digests(native.list_models(models).await.unwrap().into_inner());
    assert_eq!(digests(other.list_models(models).await.unwrap().into_inner()), want);
    for (stage, digest) in [("encoder", &want.0), ("llm", &want.1)] {
        assert!(inspected.contains(&format!("{stage:<10} {digest} as float32")), "{inspected}");
    }

    for beams in [1, 5] {
        let asked = || {
            let parts = vec![image(golden_png(0)), text("What is this?"), image(golden_png(1))];
            ask("emu2-chat", parts, v1::TextOutput { num_beams: Some(beams), ..greedy(24) })
        };
        let want = answer(&mut native, asked()).await.unwrap();
        assert!(!want.is_empty());
        assert_eq!(answer(&mut other, asked()).await.unwrap(), want, "{beams} beams");
    }
    cluster.stop().await.unwrap();
}

/// The folder as it was downloaded is refused with what to do about it.
#[test]
fn a_pickle_is_not_served_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    golden::pickled("emu2-base", folder.path());
    let mut up = binary("emu2");
    let ended = up.args(["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--model-dir"]);
    let ended = ended.arg(folder.path()).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && said.contains("emu2 convert"), "{said}");
}
