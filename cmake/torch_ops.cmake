# LOFTQ_TORCH=ON: the shared library loftq_torch, which registers the ops and their kernels with libtorch, for programs
# without Python. It needs the libtorch (2.10 or later) that Torch_DIR or CMAKE_PREFIX_PATH names, uses its stable C
# interface alone, that of libtorch 2.10, which later ones keep.
option(LOFTQ_TORCH "Build loftq_torch, the ops for libtorch" OFF)

if(LOFTQ_TORCH)
  # find_package(Torch) would ask for the CUDA toolkit of torch's own build, and for C++ headers that are not used here.
  set(torch_roots ${Torch_DIR}/../../.. ${CMAKE_PREFIX_PATH})
  foreach(prefix ${CMAKE_PREFIX_PATH})
    list(APPEND torch_roots ${prefix}/../..)  # torch.utils.cmake_prefix_path ends with share/cmake
  endforeach()
  find_path(LOFTQ_TORCH_INCLUDE torch/csrc/stable/c/shim.h HINTS ${torch_roots} PATH_SUFFIXES include REQUIRED)
  find_library(LOFTQ_TORCH_CPU torch_cpu HINTS ${torch_roots} PATH_SUFFIXES lib REQUIRED)

  # The kernels are compiled once more, without OpenMP: they run on the threads of torch.
  file(GLOB torch_sources CONFIGURE_DEPENDS csrc/aten/*.cpp csrc/loftq/*.cpp csrc/bindings/*.cpp csrc/cpu/*.cpp)
  file(GLOB torch_cuda_sources CONFIGURE_DEPENDS csrc/bindings/*_cuda.cpp)
  list(REMOVE_ITEM torch_sources ${torch_cuda_sources})
  add_library(loftq_torch SHARED ${torch_sources})
  add_library(loftq::torch ALIAS loftq_torch)
  set_target_properties(loftq_torch PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
    VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION})
  # It exports the C functions of csrc/bindings/info.cpp, loftq_*, and nothing of C++: programs reach the ops by name.
  if(NOT APPLE)
    set(torch_exports ${PROJECT_SOURCE_DIR}/cmake/torch_exports.map)
    target_link_options(loftq_torch PRIVATE LINKER:--version-script=${torch_exports})
    set_target_properties(loftq_torch PROPERTIES LINK_DEPENDS ${torch_exports})
  endif()
  target_compile_features(loftq_torch PRIVATE cxx_std_20)
  target_include_directories(loftq_torch PRIVATE csrc csrc/include)
  target_include_directories(loftq_torch SYSTEM PRIVATE ${LOFTQ_TORCH_INCLUDE})
  target_compile_definitions(loftq_torch PRIVATE LOFTQ_VERSION=${version_tag})
  target_link_libraries(loftq_torch PRIVATE loftq_options ${LOFTQ_TORCH_CPU} ${CMAKE_DL_LIBS})
  if(with_cuda)
    find_library(LOFTQ_TORCH_CUDA torch_cuda HINTS ${torch_roots} PATH_SUFFIXES lib REQUIRED)
    file(GLOB kernel_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
    target_sources(loftq_torch PRIVATE ${torch_cuda_sources} ${kernel_sources})
    set_target_properties(loftq_torch PROPERTIES
      CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
    target_compile_definitions(loftq_torch PRIVATE LOFTQ_WITH_CUDA)
    target_link_libraries(loftq_torch PRIVATE ${LOFTQ_TORCH_CUDA} CUDA::cudart_static)
  endif()
  if(LOFTQ_INSTALL)
    install(TARGETS loftq_torch LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  endif()

  if(LOFTQ_TESTS)
    add_executable(torch_ops_test csrc/tests/torch_ops_test.cpp csrc/aten/tensor.cpp)
    target_compile_features(torch_ops_test PRIVATE cxx_std_20)
    target_include_directories(torch_ops_test PRIVATE csrc)
    target_include_directories(torch_ops_test SYSTEM PRIVATE ${LOFTQ_TORCH_INCLUDE})
    target_link_libraries(torch_ops_test PRIVATE loftq_options ${LOFTQ_TORCH_CPU} ${CMAKE_DL_LIBS})
    enable_testing()
    add_test(NAME torch_ops_test COMMAND torch_ops_test $<TARGET_FILE:loftq_torch>)
  endif()
endif()
