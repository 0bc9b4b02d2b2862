# Sets NORMKIT_HAS_CUDA, and enables the language, as NORMKIT_CUDA asks.
set(NORMKIT_HAS_CUDA OFF)
if(NORMKIT_CUDA STREQUAL "pypi")
  # nvcc from the cuda-toolkit wheels of the build environment, see pyproject.toml.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u, os; print(next(p for b in u.find_spec('nvidia').submodule_search_locations for p in (os.path.join(b, 'cu13'),) if os.path.isdir(p)))"
    OUTPUT_VARIABLE _toolkit OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  file(TO_CMAKE_PATH "${_toolkit}" _toolkit)
  set(CMAKE_CUDA_COMPILER "${_toolkit}/bin/nvcc${CMAKE_EXECUTABLE_SUFFIX}" CACHE FILEPATH "" FORCE)
  set(NORMKIT_HAS_CUDA ON)
elseif(NORMKIT_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(NORMKIT_HAS_CUDA ON)
  else()
    message(WARNING "No working CUDA compiler: normkit is built without CUDA. NORMKIT_CUDA=pypi brings one.")
  endif()
elseif(NORMKIT_CUDA)
  set(NORMKIT_HAS_CUDA ON)
endif()

if(NORMKIT_HAS_CUDA)
  # SASS for every generation torch supports; PTX for what comes after 10.0 and 12.0.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES
        75-real;80-real;86-real;89-real;90-real;100-real;120-real;100-virtual;120-virtual)
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA_STANDARD 17)
  enable_language(CUDA)
endif()
