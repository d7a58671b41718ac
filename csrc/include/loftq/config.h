// What every header of the library needs first: the machines that it is for, and the names of what it exports.
#pragma once

// Sizes and strides are 64 bits wide and multiplied without a check for less, and fields of bytes are read as words.
#if defined(__SIZEOF_POINTER__) ? __SIZEOF_POINTER__ != 8 : !defined(_WIN64)
#error "loftq needs a 64-bit target: build for one (for example without -m32)"
#endif
#if defined(__BYTE_ORDER__) && defined(__ORDER_LITTLE_ENDIAN__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "loftq needs a little-endian target: stored weights are read as the words of one"
#endif

// Marks the functions that a shared library exports. Everything else is hidden, and where the library is linked
// statically, so are these: a program or library that contains it does not export it again.
#if defined(LOFTQ_EXPORTS)
#define LOFTQ_API __attribute__((visibility("default")))
#else
#define LOFTQ_API
#endif

// The inline namespace within loftq, so that symbols carry the version, and two versions may live in one process. CMake
// and setup.py take it from loftq_kernels/__init__.py; define it yourself where you compile a copy by other means.
#if !defined(LOFTQ_VERSION)
#define LOFTQ_VERSION unversioned
#endif
