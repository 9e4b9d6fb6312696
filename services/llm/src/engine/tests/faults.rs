//! What a device that fails does to those at hand.

use super::*;

fn with_slot() -> Prompt {
    Prompt { ids: vec![1; 8], slots: vec![Slot { start: 4, len: 4 }] }
}

fn broken() -> ! {
    panic!("CUDA error: an illegal memory access was encountered")
}

#[tokio::test]
async fn a_cache_that_does_not_fit_the_device_refuses_its_sequence_alone() {
    let allocate = |model: &Llama, entries| {
        assert!(entries < 1000, "CUDA out of memory. Tried to allocate 1.56 GiB");
        model.kv_cache(entries)
    };
    let tight = ModelConfig { kv_budget_bytes: 2048 * ENTRY_BYTES, ..config("emu2-base") };
    let running = Running::start_on(OnDevice { allocate, ..DEVICE }, tight).await;
    let mut other = running.submit(written(&[1, 7]), endless(300));
    assert!(matches!(other.next().await, Some(Ok(Event::Tokens(_)))));
    let refused = running.submit(written(&[1; 10]), endless(1500));
    // Does not fit the budget beside the two.
    let behind = running.submit(written(&[1, 9]), endless(600));
    assert_eq!(collect(refused).await.unwrap_err(), EngineError::OutOfMemory);
    assert_eq!(collect(other).await.unwrap().ids.len(), 299, "who was running goes on");
    assert_eq!(collect(behind).await.unwrap().generated_tokens, 600);

    // Nobody else runs: whoever waited is still let in.
    let refused = running.submit(written(&[1; 10]), endless(1500));
    let behind = running.submit(written(&[1, 9]), endless(600));
    assert_eq!(collect(refused).await.unwrap_err(), EngineError::OutOfMemory);
    assert_eq!(collect(behind).await.unwrap().generated_tokens, 600);
    running.runs(0).await;
    assert_eq!(running.metrics.kv_reserved.get(), 0);
}

#[tokio::test]
async fn embeddings_that_do_not_fit_the_device_refuse_their_sequence_alone() {
    let place = |_: &Llama, _: &Array| panic!("CUDA out of memory. Tried to allocate 20 MiB");
    let running = Running::start_on(OnDevice { place, ..DEVICE }, config("emu2-base")).await;
    let other = running.submit(written(&[1, 7]), endless(50));
    let refused = running.submit(with_slot(), endless(5));
    refused.input(rows_of(0, rows(&running.loaded, 1.0))).await.unwrap();
    assert_eq!(collect(refused).await.unwrap_err(), EngineError::OutOfMemory);
    assert_eq!(collect(other).await.unwrap().generated_tokens, 50);
}

#[tokio::test]
async fn a_device_that_fails_ends_the_engine_wherever_it_is_noticed() {
    let noticed = [
        ("embeddings", OnDevice { place: |_, _| broken(), ..DEVICE }),
        ("cache", OnDevice { allocate: |_, _| broken(), ..DEVICE }),
    ];
    for (at, on_device) in noticed {
        let running = Running::start_on(on_device, config("emu2-base")).await;
        let bystander = running.submit(with_slot(), endless(5));
        let hit = running.submit(with_slot(), endless(5));
        // The engine may have stopped by the second.
        for generation in [&hit, &bystander] {
            let _ = generation.input(rows_of(0, rows(&running.loaded, 1.0))).await;
        }
        for generation in [hit, bystander] {
            assert_eq!(collect(generation).await.unwrap_err(), EngineError::Stopped, "{at}");
        }
        timeout(PATIENCE, running.ended).await.expect("the thread ends").unwrap();
        let request = Request { prompt: with_slot(), output: endless(5), resumed: 0 };
        assert_eq!(
            running.engine.submit(request, Priority::Normal).unwrap_err(),
            EngineError::Stopped,
            "{at}"
        );
    }
}
