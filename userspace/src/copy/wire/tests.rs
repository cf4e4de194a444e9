// SPDX-License-Identifier: GPL-2.0
//! What is written is read, and nothing else is.

use super::*;
use proptest::prelude::*;

fn header(features: u32) -> Header {
    Header {
        features,
        layout: Layout::Disk,
        nr_files: 2,
        cluster_sectors: 64,
        size_sectors: 4096,
        id: [7; 16],
    }
}

fn part() -> impl Strategy<Value = Part> {
    (any::<u32>(), any::<u64>(), any::<u64>()).prop_map(|(file, offset, len)| Part {
        file,
        offset,
        len,
    })
}

fn info() -> impl Strategy<Value = FileInfo> {
    let format = prop_oneof![
        Just(Format::Raw),
        Just(Format::Ploop1(1)),
        Just(Format::Ploop1(2))
    ];
    let numbers = (any::<u32>(), any::<u64>(), any::<u64>(), any::<i64>());
    (
        "[a-zé.{}0-9-]{1,40}",
        any::<[u8; 16]>(),
        format,
        numbers,
        any::<bool>(),
    )
        .prop_map(
            |(name, guid, format, (cluster_sectors, size_sectors, len_bytes, mtime_ns), is_top)| {
                FileInfo {
                    name,
                    guid,
                    format,
                    cluster_sectors,
                    size_sectors,
                    len_bytes,
                    mtime_ns,
                    is_top,
                }
            },
        )
}

fn record() -> impl Strategy<Value = Record<'static>> {
    fn bytes() -> impl Strategy<Value = &'static [u8]> {
        static ALL: [u8; 4096] = [b'x'; 4096];
        (1..ALL.len()).prop_map(|n| &ALL[..n])
    }
    prop_oneof![
        (any::<u32>(), info()).prop_map(|(n, info)| Record::File(n, info)),
        bytes().prop_map(Record::Descriptor),
        (part(), bytes()).prop_map(|(part, bytes)| {
            Record::Data(
                Part {
                    len: bytes.len() as u64,
                    ..part
                },
                bytes,
            )
        }),
        part().prop_map(Record::Zero),
        part().prop_map(Record::Hole),
        any::<(u32, u64)>().prop_map(|(file, len)| Record::Length(file, len)),
        any::<(u32, u64)>().prop_map(|(round, dirty)| Record::Round(round, dirty)),
        Just(Record::Sync),
        "[a-z ]{0,40}".prop_map(Record::Abort),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        records in proptest::collection::vec(record(), 0..20),
        is_packed in any::<bool>(),
    ) {
        let features = if is_packed { ZSTD } else { ANSWERS };
        let mut bytes = Vec::new();
        let mut writer = Writer::begin(&mut bytes, &header(features)).unwrap();
        for record in &records {
            writer.put(record).unwrap();
        }
        let end = Record::End(writer.totals());
        writer.put(&end).unwrap();
        let mut reader = Reader::begin(bytes.as_slice()).unwrap();
        prop_assert_eq!(reader.header(), &header(features));
        for record in records.iter().chain([&end]) {
            prop_assert_eq!(&reader.read().unwrap(), record);
        }
        prop_assert!(reader.read().is_err());
    }

    #[test]
    fn noise_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut stream = Vec::new();
        Writer::begin(&mut stream, &header(0)).unwrap();
        stream.extend(&bytes);
        let mut reader = Reader::begin(stream.as_slice()).unwrap();
        prop_assert!(reader.read().is_err());
        prop_assert!(Reader::begin(bytes.as_slice()).is_err());
    }
}

/// Bytes that the documentation has.
#[test]
fn the_layout_is_the_documented_one() {
    let mut bytes = Vec::new();
    let mut writer = Writer::begin(&mut bytes, &header(ANSWERS)).unwrap();
    writer.put(&Record::Length(1, 5)).unwrap();
    assert_eq!(bytes.len(), HEADER_BYTES + HEAD_BYTES);
    assert_eq!(&bytes[..8], b"PLOOPCPY");
    let numbers = [VERSION, ANSWERS, 2, 2, 64, 0]
        .map(u32::to_le_bytes)
        .concat();
    assert_eq!(bytes[8..32], numbers);
    assert_eq!(bytes[32..40], 4096u64.to_le_bytes());
    assert_eq!(bytes[40..56], [7; 16]);
    let head = &bytes[HEADER_BYTES..];
    assert_eq!(&head[..8], b"PCR1\x06\0\0\0");
    assert_eq!((le64(head, 8), le32(head, 16), le32(head, 20)), (0, 1, 0));
    assert_eq!((le64(head, 24), le64(head, 32)), (0, 5));
    let page = include_str!("../../../../docs/copy-stream.md");
    for word in [
        "`PLOOPCPY`",
        "`PCR1`",
        "`PCA1`",
        "64 bytes",
        "48 bytes",
        "32 bytes",
    ] {
        assert!(page.contains(word), "{word}");
    }
}

#[test]
fn what_is_newer_is_called_so() {
    let mut bytes = Vec::new();
    Writer::begin(&mut bytes, &header(1 << 9)).unwrap();
    let said = Reader::begin(bytes.as_slice()).err().unwrap().to_string();
    assert!(said.contains("features 0x200"), "{said}");
    bytes[8] = 2;
    let said = Reader::begin(bytes.as_slice()).err().unwrap().to_string();
    assert!(said.contains("version 2"), "{said}");
}
