// Sparse24Weight's values and positions into panels. Once per load.
#include <cstring>

#include "linear.h"

namespace vllm_sparse::cpu {
namespace {

// One channel of one panel; the panel was zero.
void pack_channel(Format format, const std::uint8_t* values, const std::uint8_t* positions, int groups,
                  std::uint8_t* panel, int channel, std::int32_t& sum) {
    const int bits = value_bits(format);
    std::uint32_t metadata = 0;
    std::uint32_t lines[kGroups] = {};
    for (int g = 0; g < groups; ++g) {
        const unsigned nibble = positions[g / 2] >> (4 * (g % 2)) & 15u;
        for (int e = 0; e < 2; ++e) {
            const std::uint32_t position = nibble >> (2 * e) & 3u;
            std::uint32_t value = values[2 * g + e];
            if (bits == 16) {
                std::uint16_t word;
                std::memcpy(&word, values + 2 * (2 * g + e), sizeof word);
                value = word;
            }
            if (format == Format::int8) sum += static_cast<std::int8_t>(value);
            value &= (1u << bits) - 1;
            if (takes_int8(format)) {
                const int per_line = 8 / bits, pair = g / 2, byte = 2 * (g % 2) + e;
                metadata |= position << (8 * byte + 2 * pair);
                lines[pair / per_line] |= value << (8 * byte + bits * (pair % per_line));
            } else {
                const int per_line = 16 / bits;
                metadata |= position << (16 * e + 2 * g);
                lines[g / per_line] |= value << (16 * e + bits * (g % per_line));
            }
        }
    }
    std::memcpy(panel + 4 * channel, &metadata, sizeof metadata);
    for (int line = 0; line < panel_bytes(format) / kLine - 1; ++line)
        std::memcpy(panel + kLine * (1 + line) + 4 * channel, &lines[line], sizeof lines[line]);
}

}  // namespace

std::int64_t stripes(std::int64_t n) { return (n + kChannels - 1) / kChannels; }

std::int64_t packed_bytes(Format format, std::int64_t n, std::int64_t k) {
    return stripes(n) * ((k + kColumns - 1) / kColumns) * panel_bytes(format);
}

void pack(Format format, std::int64_t n, std::int64_t k, const void* values, const std::uint8_t* positions,
          std::uint8_t* panels, std::int32_t* sums) {
    const std::int64_t panels_per_stripe = (k + kColumns - 1) / kColumns;
    const std::int64_t bytes = panel_bytes(format), value_bytes = value_bits(format) == 16 ? 2 : 1;
#pragma omp parallel for
    for (std::int64_t stripe = 0; stripe < stripes(n); ++stripe) {
        std::uint8_t* panel = panels + stripe * panels_per_stripe * bytes;
        std::memset(panel, 0, panels_per_stripe * bytes);
        std::int32_t stripe_sums[kChannels] = {};
        for (std::int64_t p = 0; p < panels_per_stripe; ++p, panel += bytes) {
            const std::int64_t column = p * kColumns;
            const int groups = static_cast<int>(k - column < kColumns ? (k - column) / 4 : kGroups);
            for (int c = 0; c < kChannels && stripe * kChannels + c < n; ++c) {
                const std::int64_t row = stripe * kChannels + c;
                pack_channel(format,
                             static_cast<const std::uint8_t*>(values) + (row * (k / 2) + column / 2) * value_bytes,
                             positions + row * ((k + 7) / 8) + column / 8, groups, panel, c, stripe_sums[c]);
            }
        }
        if (format == Format::int8) std::memcpy(sums + stripe * kChannels, stripe_sums, sizeof stripe_sums);
    }
}

}  // namespace vllm_sparse::cpu
