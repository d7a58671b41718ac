# Builds examples/consumer in one of the ways in which a project gets at the library, and runs it:
#   cmake -DWAY=package|subdirectory|fetch -DSHARED=ON|OFF -DSOURCE=<repository> -DBUILD=<folder> -DGENERATOR=...
#         -DMAKE_PROGRAM=... -DCXX=<compiler> [-DLIBRARY=<folder where the package is built already>]
#         -P consumer_test.cmake
# Nothing is optimized here: what is tested is how the parts fit, and the library compiles many times faster so.
set(common -G ${GENERATOR} -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM} -DCMAKE_CXX_COMPILER=${CXX}
  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0 -DBUILD_SHARED_LIBS=${SHARED})

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  message("${output}")
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "failed: ${ARGN}")
  endif()
endfunction()

if(WAY STREQUAL "package")
  if(NOT LIBRARY)
    set(LIBRARY ${BUILD}/library)
    run(${CMAKE_COMMAND} -S ${SOURCE} -B ${LIBRARY} ${common} -DCMAKE_INSTALL_LIBDIR=lib)
    run(${CMAKE_COMMAND} --build ${LIBRARY})
  endif()
  set(prefix ${BUILD}/prefix)
  file(REMOVE_RECURSE ${prefix} ${BUILD}/staged)
  run(${CMAKE_COMMAND} --install ${LIBRARY} --prefix ${BUILD}/staged)  # then moved: a package may lie anywhere
  file(RENAME ${BUILD}/staged ${prefix})
  set(get -DCMAKE_PREFIX_PATH=${prefix})
elseif(WAY STREQUAL "subdirectory")
  set(get -DLOFTQ_SOURCE_DIR=${SOURCE})
else()
  set(get -DLOFTQ_URL=unused -DFETCHCONTENT_SOURCE_DIR_LOFTQ=${SOURCE})
endif()
# A host may treat its own warnings as errors; those of the library must not become errors thereby.
run(${CMAKE_COMMAND} -S ${SOURCE}/examples/consumer -B ${BUILD}/consumer ${common} ${get}
  -DCMAKE_COMPILE_WARNING_AS_ERROR=ON)
run(${CMAKE_COMMAND} --build ${BUILD}/consumer)
run(${BUILD}/consumer/consumer)
