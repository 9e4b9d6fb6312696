//! How many embeddings an image can become: a rule that whoever asks for them and whoever makes them must share.
//!
//! The encoder pools its grid of patches by squares. As upstream, the stride for n_query is ⌊side / √n_query⌋, which
//! leaves ⌊side / stride⌋² embeddings. Where that is another number than n_query, a prompt would hold slots that
//! nothing fills, so such a number is refused: by whoever reads it first.

use std::collections::BTreeSet;

/// Returns the pooling stride ⌊grid_side / √n_query⌋, in patches: the largest stride whose square times `n_query` fits
/// the grid. None when that is 0, or for no query at all.
pub fn stride(grid_side: u32, n_query: u32) -> Option<u32> {
    if n_query == 0 {
        return None;
    }
    let (side, n_query) = (u64::from(grid_side), u64::from(n_query));
    let stride = (1..=side).rev().find(|stride| stride * stride * n_query <= side * side)?;
    // It is at most the side.
    Some(stride as u32)
}

/// Describes what is wrong with asking for so many embeddings, if anything; the text reads on from the field's name.
pub fn problem(grid_side: u32, n_query: u32) -> Option<String> {
    let possible: BTreeSet<u64> =
        (1..=grid_side).map(|stride| u64::from(grid_side / stride).pow(2)).collect();
    if possible.contains(&n_query.into()) {
        return None;
    }
    let possible: Vec<_> = possible.iter().map(u64::to_string).collect();
    let possible = possible.join(", ");
    Some(format!(
        "must be what pooling {grid_side} x {grid_side} patches can leave ({possible}), got {n_query}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_are_floors() {
        // The published grid is 32 by 32.
        let cases =
            [(1, 32), (4, 16), (64, 4), (256, 2), (1024, 1), (2, 22), (3, 18), (8, 11), (63, 4), (65, 3)];
        for (n_query, expected) in cases {
            assert_eq!(stride(32, n_query), Some(expected), "{n_query}");
            assert_eq!((32.0 / f64::from(n_query).sqrt()).floor() as u32, expected, "{n_query}");
        }
        assert_eq!(stride(32, 0), None);
        assert_eq!(stride(32, 1025), None);
        assert_eq!(stride(32, u32::MAX), None);
    }

    #[test]
    fn a_number_fits_when_its_stride_leaves_just_as_many() {
        for side in 1..=40 {
            for n_query in 0..=side * side + 1 {
                let left = stride(side, n_query).map(|stride| (side / stride).pow(2));
                let fits = left == Some(n_query);
                assert_eq!(problem(side, n_query).is_none(), fits, "{n_query} of {side} x {side}");
            }
        }
    }

    #[test]
    fn a_refusal_says_what_would_fit() {
        let text = problem(4, 8).unwrap();
        assert_eq!(text, "must be what pooling 4 x 4 patches can leave (1, 4, 16), got 8");
        assert!(problem(0, 1).is_some());
    }
}
