#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| emu2_fuzz::image(bytes));
