# Sets CMAKE_CUDA_ARCHITECTURES where nobody has said any: two minutes on two cores, and seven for every GPU.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND "$ENV{CUDAARCHS}" STREQUAL "")
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE _answer ERROR_QUIET RESULT_VARIABLE _status)
  set(_capabilities "")
  if(_status STREQUAL "0") # else it may be prose, with the version of a driver in it
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" _capabilities "${_answer}")
  endif()
  set(_why "the GPUs of this machine")
  foreach(_capability IN LISTS _capabilities)
    if(_capability VERSION_GREATER_EQUAL 7.5)
      string(REPLACE "." "" _architecture "${_capability}")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${_architecture})
    endif()
  endforeach()
  if(CMAKE_CUDA_ARCHITECTURES)
    list(REMOVE_DUPLICATES CMAKE_CUDA_ARCHITECTURES)
  else()
    # Machine code for 8.0, 8.6 and 8.9, and PTX, of which the driver makes code for later GPUs.
    set(CMAKE_CUDA_ARCHITECTURES 80)
    set(_why "no GPU answers here; 8.x runs it as it is, later GPUs compile it at first use")
  endif()
  message(STATUS "CUDA architectures: ${CMAKE_CUDA_ARCHITECTURES} (${_why}). "
                 "CUDAARCHS names others, CUDAARCHS=all-major those of every GPU.")
endif()
