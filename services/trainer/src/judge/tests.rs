//! The judge's own score on scenes whose contents are known: below 95 % it would not be used.

use super::*;
use crate::data::{SIDE, Scene, Split, World, tests::WORLD};

const SCENES: u64 = 200;

fn inspect(judge: &Judge, scene: &Scene) -> Verdict {
    let side = SIDE as u32;
    let image = RgbImage::from_raw(side, side, WORLD.image(scene).rgb().to_vec()).unwrap();
    judge.inspect(&image)
}

/// Shares of scenes whose thing, count and background are found.
fn scores(styles: &[Style], scene: impl Fn(&World, u64) -> Scene) -> [f64; 3] {
    let judge = Judge::new(WORLD.drawings(), WORLD.concepts(), styles);
    let mut right = [0_u64; 3];
    let mut wrong = std::collections::BTreeMap::<&str, u32>::new();
    for index in 0..SCENES {
        let scene = scene(&WORLD, index);
        let found = inspect(&judge, &scene);
        let (concept, count) = scene.counts()[0];
        if found.concept() != Some(concept) || found.count() != count as usize {
            *wrong.entry(concept.name()).or_default() += 1;
        }
        right[0] += u64::from(found.concept() == Some(concept));
        right[1] += u64::from(found.count() == count as usize);
        right[2] += u64::from(found.background == scene.background);
    }
    println!("{wrong:?}");
    right.map(|right| right as f64 / SCENES as f64)
}

#[test]
fn it_knows_real_scenes() {
    let kinds: [(&str, Split, &[Style]); 3] = [
        ("trained styles", Split::Test, &Style::TRAINED),
        ("the unseen style", Split::Unseen, &[Style::Twemoji]),
        ("trained styles, of training", Split::Train, &Style::TRAINED),
    ];
    for (name, split, styles) in kinds {
        let single = |world: &World, index| {
            world.composer(split).single(&mut world.random(split, "judged single", index))
        };
        let gathered = |world: &World, index| {
            world.composer(split).gathered(&mut world.random(split, "judged gathered", index))
        };
        let spread = |world: &World, index| {
            world.composer(split).spread(&mut world.random(split, "judged spread", index))
        };
        let painted =
            |world: &World, index| world.painter(split).spread(&mut world.random(split, "judged", index));
        let all = [
            ("single", scores(styles, single)),
            ("gathered", scores(styles, gathered)),
            ("spread", scores(styles, spread)),
            ("to paint", scores(styles, painted)),
        ];
        for (arrangement, scores) in all {
            println!("{name}, {arrangement}: thing, count, background {scores:.3?}");
            assert!(scores.iter().all(|&score| score >= 0.95), "{name}, {arrangement}: {scores:?}");
        }
    }
}

#[test]
fn an_empty_image_shows_nothing() {
    let judge = Judge::new(WORLD.drawings(), 8, &Style::TRAINED);
    let found = judge.inspect(&RgbImage::from_pixel(64, 64, image::Rgb(Background::Green.rgb())));
    assert_eq!((found.background, found.count(), found.concept()), (Background::Green, 0, None));
}
