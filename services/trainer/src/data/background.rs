//! The named colours that scenes stand on.

/// A background of one of the named colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Background {
    /// RGB 190, 40, 50.
    Red,
    /// RGB 245, 225, 120.
    Yellow,
    /// RGB 60, 150, 85.
    Green,
    /// RGB 60, 110, 200.
    Blue,
    /// RGB 125, 70, 165.
    Purple,
    /// RGB 250, 185, 210.
    Pink,
    /// RGB 245, 245, 245.
    White,
    /// RGB 25, 25, 30.
    Black,
}

impl Background {
    /// Every background, in the order of their indices.
    pub const ALL: [Self; 8] = [
        Self::Red,
        Self::Yellow,
        Self::Green,
        Self::Blue,
        Self::Purple,
        Self::Pink,
        Self::White,
        Self::Black,
    ];

    /// Returns the colour's name as documents write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Red => "red",
            Self::Yellow => "yellow",
            Self::Green => "green",
            Self::Blue => "blue",
            Self::Purple => "purple",
            Self::Pink => "pink",
            Self::White => "white",
            Self::Black => "black",
        }
    }

    /// Returns the background's place in [`Self::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// Returns red, green and blue.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Red => [190, 40, 50],
            Self::Yellow => [245, 225, 120],
            Self::Green => [60, 150, 85],
            Self::Blue => [60, 110, 200],
            Self::Purple => [125, 70, 165],
            Self::Pink => [250, 185, 210],
            Self::White => [245, 245, 245],
            Self::Black => [25, 25, 30],
        }
    }
}
