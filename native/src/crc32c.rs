//! CRC-32C (Castagnoli), in the two flavours drbdts needs.

/// The ordinary checksum (init and final inversion, RFC 3720 appendix B.4), continuing from `seed`.
pub fn crc32c(bytes: &[u8], seed: u32) -> u32 {
    ::crc32c::crc32c_append(seed, bytes)
}

/// Register starts at 0 and is not inverted: what the Linux crypto API calls crc32c with a zero key, as DRBD's
/// `verify-alg crc32c` and `csums-alg crc32c` put on the wire.
pub fn crc32c_raw(bytes: &[u8]) -> u32 {
    !::crc32c::crc32c_append(u32::MAX, bytes)
}
