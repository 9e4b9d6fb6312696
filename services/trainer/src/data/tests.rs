//! What holds for all of the data.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use super::*;

const SPLITS: [Split; 3] = [Split::Train, Split::Test, Split::Unseen];

/// Fetched once: the folder of drawings.
fn folder() -> PathBuf {
    let fetcher = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/fetch/drawings.py");
    let output = Command::new("python3").arg(fetcher).arg("--unseen").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().into()
}

pub(crate) static FOLDER: LazyLock<PathBuf> = LazyLock::new(folder);

pub(crate) static WORLD: LazyLock<World> =
    LazyLock::new(|| World::open(&FOLDER, concept::CONCEPTS_MAX, 1, true).unwrap());

#[test]
fn training_never_shows_what_is_held_out() {
    let mut counts = HashSet::new();
    for index in 0..100_000 {
        let scene = WORLD.scene(Split::Train, index);
        assert!(!held_out::scene(&scene), "sample {index}: {scene:?}");
        counts.extend(scene.counts());
    }
    // Everything that is not held out does come.
    let shown = Concept::all().flat_map(|concept| (1..=4).map(move |count| (concept, count)));
    let shown: HashSet<_> = shown.filter(|&(concept, count)| !held_out::count(concept, count)).collect();
    assert_eq!(counts, shown);
}

#[test]
fn tests_show_what_is_held_out_and_no_other_style() {
    for index in 0..2_000 {
        let scene = WORLD.scene(Split::Test, index);
        assert_eq!(held_out::composition(&scene), scene.things.len() > 1, "sample {index}: {scene:?}");
        assert!(scene.things.iter().all(|thing| Style::TRAINED.contains(&thing.style)));
        let scene = WORLD.scene(Split::Unseen, index);
        assert!(!held_out::composition(&scene) && held_out::scene(&scene));
    }
}

#[test]
fn a_tenth_is_held_out_whatever_the_order() {
    let concepts: Vec<_> = Concept::all().collect();
    let pairs = concepts.iter().enumerate().flat_map(|(i, a)| concepts[..i].iter().map(move |b| (*a, *b)));
    let pairs: Vec<_> = pairs.collect();
    let held = pairs.iter().filter(|(a, b)| held_out::pair(*a, *b)).count() as f64 / pairs.len() as f64;
    assert!((0.08..0.12).contains(&held), "{held}");
    assert!(pairs.iter().all(|&(a, b)| held_out::pair(a, b) == held_out::pair(b, a)));
    let counts: Vec<_> = concepts.iter().flat_map(|&c| (2..=4).map(move |n| held_out::count(c, n))).collect();
    let held = counts.iter().filter(|held| **held).count() as f64 / counts.len() as f64;
    assert!((0.06..0.14).contains(&held), "{held}");
    assert!(!concepts.iter().any(|&concept| held_out::count(concept, 1)));
}

#[test]
fn a_sample_is_the_same_anywhere_and_no_other() {
    let again = World::open(&FOLDER, concept::CONCEPTS_MAX, 1, true).unwrap();
    let other = World::open(&FOLDER, concept::CONCEPTS_MAX, 2, true).unwrap();
    let mut seen = HashSet::new();
    for split in SPLITS {
        for index in 0..50 {
            let scene = WORLD.scene(split, index);
            let image = WORLD.image(&scene);
            assert_eq!(again.scene(split, index), scene);
            assert_eq!(again.image(&scene), image);
            assert_ne!(other.scene(split, index), scene);
            assert!(seen.insert(image.rgb().to_vec()), "{split:?} {index} came before");
        }
    }
}

#[test]
fn things_lie_apart_and_where_their_layout_says() {
    for index in 0..20_000 {
        let scene = WORLD.scene(Split::Train, index);
        let context = || format!("sample {index}: {scene:?}");
        for (number, thing) in scene.things.iter().enumerate() {
            let Bounds { left, top, right, bottom } = thing.bounds;
            let (width, height) = (right - left, bottom - top);
            assert_eq!(width.max(height), thing.size, "{}", context());
            assert!(right <= SIDE as u32 && bottom <= SIDE as u32, "{}", context());
            let apart = |other: &Thing| {
                let other = other.bounds;
                left >= other.right || other.left >= right || top >= other.bottom || other.top >= bottom
            };
            assert!(scene.things[..number].iter().all(apart), "{}", context());
        }
        let middle = SIDE as f32 / 2.0;
        let whole = scene.things.iter().map(|thing| thing.bounds).reduce(Bounds::around).unwrap();
        let lies = |place: Place, bounds: Bounds| {
            let [x, y] = bounds.center();
            place.sides().map_or((x - middle).abs() < 8.0 && (y - middle).abs() < 8.0, |sides| {
                sides == (x > middle, y > middle)
            })
        };
        let center = |index: usize| scene.things[index].bounds.center();
        let holds = match &scene.arrangement {
            Arrangement::Single(place) => scene.things.len() == 1 && lies(*place, whole),
            Arrangement::Group(place) => {
                let same = scene.things.iter().all(|thing| thing.concept == scene.things[0].concept);
                same && scene.things.len() > 1 && place.is_none_or(|place| lies(place, whole))
            }
            Arrangement::Pair(relation) => {
                let [dx, dy] = [0, 1].map(|axis| center(1)[axis] - center(0)[axis]);
                let along = match relation {
                    Relation::LeftOf => dx,
                    Relation::RightOf => -dx,
                    Relation::Above => dy,
                    Relation::Below => -dy,
                };
                along > 8.0
            }
            Arrangement::Corners(places) => {
                let mut pairs = places.iter().zip(&scene.things);
                places.len() == scene.things.len() && pairs.all(|(place, thing)| lies(*place, thing.bounds))
            }
        };
        assert!(holds, "{}", context());
    }
}

#[test]
fn every_thing_can_be_told_from_most_backgrounds() {
    for (concept, style) in Concept::all().flat_map(|c| Style::TRAINED.map(|style| (c, style))) {
        let fits = |background: &Background| WORLD.drawings().legible(concept, style, *background);
        let backgrounds = Background::ALL.into_iter().filter(fits).count();
        assert!(backgrounds >= 5, "{}: {backgrounds}", concept.name());
    }
}

/// Names are words of emojibase, and none could be taken for another.
#[test]
fn names_are_the_usual_ones() {
    let names = std::fs::read_to_string(FOLDER.join("emojibase.json")).unwrap();
    let names: Vec<serde_json::Value> = serde_json::from_str(&names).unwrap();
    let mut written = HashSet::new();
    for concept in Concept::all() {
        let is_it = |entry: &&serde_json::Value| {
            entry["hexcode"].as_str().is_some_and(|code| {
                code.to_lowercase().trim_end_matches("-fe0f") == concept.hexcode().trim_end_matches("-fe0f")
            })
        };
        let entry = names.iter().find(is_it).unwrap_or_else(|| panic!("{}", concept.name()));
        let words = format!("{} {}", entry["label"], entry["tags"]).to_lowercase();
        let mut words = words.split(|c: char| !c.is_alphanumeric());
        let known = words.any(|word| word == concept.name() || word == concept.plural());
        assert!(known, "{} is not a word of {entry}", concept.name());
        assert!(written.insert(concept.name().to_owned()));
        assert_eq!(Concept::named(concept.name()), Some(concept));
        assert_eq!(Concept::named(&concept.plural()), Some(concept));
    }
}

#[test]
fn a_damaged_atlas_is_made_anew() {
    let copy = tempfile::tempdir().unwrap();
    for file in ["noto.icons.json", "noto.chars.json"] {
        std::fs::copy(FOLDER.join(file), copy.path().join(file)).unwrap();
    }
    let pixels = |atlas: &Atlas| atlas.sprite(Concept(3), 30).rgba.clone();
    let first = Atlas::open(copy.path(), Style::Noto).unwrap();
    let kept = std::fs::read_dir(copy.path()).unwrap().map(|entry| entry.unwrap().path());
    let kept = kept.into_iter().find(|path| path.extension().is_some_and(|ending| ending == "rgba")).unwrap();
    let mut bytes = std::fs::read(&kept).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&kept, &bytes).unwrap();
    let second = Atlas::open(copy.path(), Style::Noto).unwrap();
    assert_eq!(pixels(&first), pixels(&second));
    assert_ne!(std::fs::read(&kept).unwrap(), bytes, "the damaged file is still there");
}

#[test]
fn without_drawings_the_error_says_how_to_get_them() {
    let error = World::open(Path::new("/nowhere"), 60, 1, false).err().unwrap();
    assert!(format!("{error:#}").contains("deploy/fetch/drawings.py"), "{error:#}");
    let error = World::open(&FOLDER, 7, 1, false).err().unwrap();
    assert!(error.to_string().contains("concepts is 7, must be 8 to 96"), "{error}");
}
