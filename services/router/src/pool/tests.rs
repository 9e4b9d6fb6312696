use super::*;
use crate::stages::Encoder;

#[tokio::test]
async fn models_that_name_the_same_replicas_share_a_pool() {
    let mut pools = Pools::<Encoder>::new(&PoolConfig::default(), 1 << 20);
    let mut pool = |endpoints: &[&str]| {
        let endpoints: Vec<_> = endpoints.iter().map(|it| format!("http://{it}")).collect();
        pools.get(&endpoints).unwrap()
    };
    let (one, two) = (pool(&["a:1", "b:1"]), pool(&["b:1", "a:1"]));
    assert!(Arc::ptr_eq(&one, &two));
    assert_eq!(one.members.replicas().len(), 2);
    for other in [pool(&["a:1"]), pool(&["a:1", "b:2"])] {
        assert!(!Arc::ptr_eq(&one, &other));
    }
}
