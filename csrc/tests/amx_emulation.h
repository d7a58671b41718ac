// Runs AMX instructions on machines that do not have them: each raises SIGILL, whose handler does what the Intel
// manual says that the instruction does, and stops the test at what the manual forbids. The kernels' own object code
// is what runs. Linux on x86-64.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "loftq/half.h"

namespace loftq::testing {

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

// The tile registers of one thread.
class TileRegisters {
 public:
  void configure(const uint8_t* memory) {  // LDTILECFG
    require(memory[0] == 1, "palette is not 1");
    for (int i = 1; i < 16; ++i) require(memory[i] == 0, "reserved bytes or start_row are not 0");
    for (int t = 0; t < 16; ++t) {
      uint16_t row_bytes;
      std::memcpy(&row_bytes, memory + 16 + 2 * t, sizeof row_bytes);
      const uint8_t rows = memory[48 + t];
      require(t < 8 || (row_bytes == 0 && rows == 0), "there are eight tiles");
      require(row_bytes <= kRowBytes && rows <= kRows && (row_bytes == 0) == (rows == 0), "no such shape of a tile");
      if (t >= 8) continue;
      tiles_[t].row_bytes = row_bytes;
      tiles_[t].rows = rows;
      std::memset(tiles_[t].bytes, 0, sizeof tiles_[t].bytes);
    }
    configured_ = true;
  }

  void release() { configured_ = false; }  // TILERELEASE
  bool configured() const { return configured_; }

  void zero(int tile) { std::memset(at(tile).bytes, 0, sizeof at(tile).bytes); }  // TILEZERO

  void load(int tile, const char* rows, int64_t stride) {  // TILELOADD
    zero(tile);
    for (int r = 0; r < at(tile).rows; ++r) std::memcpy(at(tile).bytes[r], rows + r * stride, at(tile).row_bytes);
  }

  void store(int tile, char* rows, int64_t stride) const {  // TILESTORED
    for (int r = 0; r < at(tile).rows; ++r) std::memcpy(rows + r * stride, at(tile).bytes[r], at(tile).row_bytes);
  }

  // TDPBF16PS: c += a b, the even and the odd elements of a in sums of their own
  void multiply(int c, int a, int b) {
    require(c != a && c != b && a != b, "TDPBF16PS needs three different tiles");
    Tile &sum = at(c), &left = at(a), &right = at(b);
    require(left.row_bytes % 4 == 0 && right.row_bytes % 4 == 0 && sum.row_bytes % 4 == 0, "half a lane");
    require(sum.rows == left.rows && sum.row_bytes == right.row_bytes && left.row_bytes / 4 == right.rows,
            "the shapes of the tiles do not fit together");
    const Elements x(left), y(right);
    for (int m = 0; m < sum.rows; ++m) {
      float partial[kElements] = {};
      for (int k = 0; k < left.row_bytes / 4; ++k) {
        // A product of two bfloat16 is exact in float32, so these two roundings are one, as in the instruction.
        for (int n = 0; n < kElements; ++n) {
          partial[n] = flushed(partial[n] + x.values[m][2 * k + n % 2] * y.values[k][n]);
        }
      }
      float row[kElements / 2];
      std::memcpy(row, sum.bytes[m], sizeof row);
      for (int n = 0; n < sum.row_bytes / 4; ++n) {
        row[n] = flushed(flushed(row[n]) + flushed(partial[2 * n] + partial[2 * n + 1]));
      }
      std::memcpy(sum.bytes[m], row, sizeof row);
    }
  }

 private:
  static constexpr int kRows = 16, kRowBytes = 64, kElements = 32;

  struct Tile {
    int rows = 0, row_bytes = 0;
    char bytes[kRows][kRowBytes];
  };

  static float flushed(float v) { return std::fabs(v) < FLT_MIN ? std::copysign(0.0f, v) : v; }

  struct Elements {
    float values[kRows][kElements];

    explicit Elements(const Tile& tile) {
      uint16_t words[kRows][kElements];
      std::memcpy(words, tile.bytes, sizeof words);
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kElements; ++i) values[r][i] = flushed(bfloat_to_float(words[r][i]));
      }
    }
  };

  Tile& at(int tile) {
    require(configured_, "tiles are not configured");
    require(tile < 8 && tiles_[tile].rows > 0, "the configuration does not have this tile");
    return tiles_[tile];
  }
  const Tile& at(int tile) const { return const_cast<TileRegisters*>(this)->at(tile); }

  bool configured_ = false;
  Tile tiles_[8];
};

inline TileRegisters& tile_registers() {
  thread_local TileRegisters registers;
  return registers;
}

inline std::atomic<int64_t>& tile_products() {
  static std::atomic<int64_t> count{0};
  return count;
}

// VEX.128 [prefix] 0F38.W0 opcode ModRM [SIB] [displacement]
class AmxInstruction {
 public:
  AmxInstruction(const uint8_t* code, const greg_t* registers) : code_(code), registers_(registers) {
    require(code[0] == 0xc4 && (code[1] & 0x1f) == 2 && (code[2] & 0x84) == 0,
            "an illegal instruction of another kind");
  }

  // Returns its length.
  int run(TileRegisters& tiles) {
    const uint8_t prefix = code_[2] & 3, opcode = code_[3], modrm = code_[4];
    const int reg = modrm >> 3 & 7;
    const bool memory = modrm >> 6 != 3;
    if (opcode == 0x49 && prefix == kNone && memory) {
      find_operand();
      tiles.configure(reinterpret_cast<const uint8_t*>(address_));
    } else if (opcode == 0x49 && prefix == kNone) {
      tiles.release();
    } else if (opcode == 0x49 && prefix == kF2 && !memory) {
      tiles.zero(reg);
    } else if (opcode == 0x4b && prefix == kF2 && memory) {
      find_operand();
      tiles.load(reg, address_, stride_);
    } else if (opcode == 0x4b && prefix == kF3 && memory) {
      find_operand();
      tiles.store(reg, address_, stride_);
    } else {
      require(opcode == 0x5c && prefix == kF3 && !memory, "an instruction that this emulation does not have");
      tiles.multiply(reg, modrm & 7, (~code_[2] >> 3 & 15));
      ++tile_products();
    }
    return length_;
  }

 private:
  enum : uint8_t { kNone = 0, kF3 = 2, kF2 = 3 };

  int64_t general(int number) const {
    constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[kOrder[number]];
  }

  int64_t displacement(int bytes) {
    int64_t value = static_cast<int8_t>(code_[length_]);
    if (bytes == 4) {
      int32_t four;
      std::memcpy(&four, code_ + length_, sizeof four);
      value = four;
    }
    length_ += bytes;
    return value;
  }

  // Address = base + displacement; the index of a SIB byte is the distance of rows.
  void find_operand() {
    const int mod = code_[4] >> 6, rm = code_[4] & 7;
    const int index_high = code_[1] & 0x40 ? 0 : 8, base_high = code_[1] & 0x20 ? 0 : 8;
    int base = rm;
    if (rm == 4) {
      const uint8_t sib = code_[length_++];
      base = sib & 7;
      const int index = (sib >> 3 & 7) + index_high;
      stride_ = index == 4 ? 0 : general(index) << (sib >> 6);
    }
    require((code_[3] == 0x4b) == (rm == 4 && stride_ != 0), "an address that this emulation does not have");
    int64_t address = 0;
    if (mod == 0 && base == 5) {
      address = displacement(4);
      if (rm == 5) address += reinterpret_cast<int64_t>(code_) + length_;  // from the next instruction on
    } else {
      address = general(base + base_high) + (mod == 0 ? 0 : displacement(mod == 1 ? 1 : 4));
    }
    address_ = reinterpret_cast<char*>(address);
  }

  const uint8_t* code_;
  const greg_t* registers_;
  int length_ = 5;
  char* address_ = nullptr;
  int64_t stride_ = 0;
};

inline void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  AmxInstruction instruction(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  registers[REG_RIP] += instruction.run(tile_registers());
}

inline void emulate_amx() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace loftq::testing
