// LOFTQ_TARGET_BEGIN("avx2") ... LOFTQ_TARGET_END: functions defined between them are compiled for that instruction
// set, whatever the -m flags of the build. Every standard header must be included before: its inline functions would
// otherwise be compiled for the wider set and, merged by the linker, run on machines that lack it.
#pragma once

#define LOFTQ_PRAGMA(text) _Pragma(#text)

// Before a loop of constant length whose body indexes arrays that must live in registers.
#if defined(__clang__)
#define LOFTQ_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define LOFTQ_UNROLL _Pragma("GCC unroll 64")
#else
#define LOFTQ_UNROLL
#endif

// Functions whose callers must keep their arrays in registers.
#define LOFTQ_INLINE inline __attribute__((always_inline))
#define LOFTQ_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__clang__)
#define LOFTQ_X86 1
#define LOFTQ_TARGET_BEGIN(isa) LOFTQ_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LOFTQ_TARGET_END LOFTQ_PRAGMA(clang attribute pop)
#elif defined(__x86_64__) && defined(__GNUC__)
#define LOFTQ_X86 1
#define LOFTQ_TARGET_BEGIN(isa) LOFTQ_PRAGMA(GCC push_options) LOFTQ_PRAGMA(GCC target(isa))
#define LOFTQ_TARGET_END LOFTQ_PRAGMA(GCC pop_options)
#else
#define LOFTQ_X86 0  // other machines have the scalar kernels, vectorised by the compiler as far as it can
#endif
