//! A sentencepiece file of a given number of pieces, for models that have none: LLaMA's settings, bytes and printable
//! ASCII, and pieces that text never becomes but random weights may choose.

/// Field numbers and values of sentencepiece_model.proto.
const PIECES: u8 = 1;
const TRAINER: u8 = 2;
const NORMALIZER: u8 = 3;
const NORMAL: u8 = 1;
const UNKNOWN: u8 = 2;
const CONTROL: u8 = 3;
const BYTE: u8 = 6;

/// What stands for a space inside pieces.
const SPACE: char = '\u{2581}';

pub(super) fn made_up(pieces: usize) -> Vec<u8> {
    let mut all =
        vec![("<unk>".to_owned(), UNKNOWN), ("<s>".to_owned(), CONTROL), ("</s>".to_owned(), CONTROL)];
    all.extend((0..=u8::MAX).map(|byte| (format!("<0x{byte:02X}>"), BYTE)));
    all.extend([SPACE].into_iter().chain('!'..='~').map(|letter| (letter.to_string(), NORMAL)));
    // Reached from a text only by way of `▁w`, which is no piece.
    all.extend(
        (0..).map(|index| (format!("{SPACE}w{index}"), NORMAL)).take(pieces.saturating_sub(all.len())),
    );
    let mut file = Vec::new();
    for (rank, (text, kind)) in all.into_iter().take(pieces).enumerate() {
        let mut piece = Vec::new();
        bytes(&mut piece, 1, text.as_bytes());
        piece.push(2 << 3 | 5);
        piece.extend((-(rank as f32)).to_le_bytes());
        number(&mut piece, 3, kind);
        bytes(&mut file, PIECES, &piece);
    }
    let mut trainer = Vec::new();
    // Byte pairs; bytes for what no piece spells.
    number(&mut trainer, 3, 2);
    number(&mut trainer, 35, 1);
    bytes(&mut file, TRAINER, &trainer);
    let mut normalizer = Vec::new();
    // A dummy prefix; white space stays.
    number(&mut normalizer, 3, 1);
    number(&mut normalizer, 4, 0);
    bytes(&mut file, NORMALIZER, &normalizer);
    file
}

fn number(message: &mut Vec<u8>, field: u8, value: u8) {
    key(message, field, 0);
    message.push(value);
}

fn bytes(message: &mut Vec<u8>, field: u8, value: &[u8]) {
    key(message, field, 2);
    let length = u8::try_from(value.len()).ok().filter(|length| *length < 128);
    message.push(length.expect("nothing here is longer than a piece"));
    message.extend(value);
}

fn key(message: &mut Vec<u8>, field: u8, wire: u16) {
    let key = u16::from(field) << 3 | wire;
    if key >= 128 {
        message.extend([(key & 127 | 128) as u8, (key >> 7) as u8]);
    } else {
        message.push(key as u8);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn it_has_the_pieces_asked_for_and_each_once() {
        for count in [899, 32_000] {
            let file = made_up(count);
            let (mut rest, mut texts) = (&file[..], BTreeSet::new());
            while let [0x0A, length, after @ ..] = rest {
                let (piece, next) = after.split_at(usize::from(*length));
                let [0x0A, text, spelled @ ..] = piece else { panic!("no text: {piece:?}") };
                texts.insert(spelled[..usize::from(*text)].to_vec());
                rest = next;
            }
            assert_eq!(texts.len(), count);
            assert_eq!(rest, [0x12, 5, 0x18, 2, 0x98, 2, 1, 0x1A, 4, 0x18, 1, 0x20, 0]);
        }
    }
}
