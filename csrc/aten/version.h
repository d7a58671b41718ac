// The oldest torch that the library runs with. It comes before every other header of torch: they leave out what is
// newer.
#pragma once

#define LOFTQ_TORCH_MAJOR 2
#define LOFTQ_TORCH_MINOR 10
#define TORCH_TARGET_VERSION (((0ULL + LOFTQ_TORCH_MAJOR) << 56) | ((0ULL + LOFTQ_TORCH_MINOR) << 48))
