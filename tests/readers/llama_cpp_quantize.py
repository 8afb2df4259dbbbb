"""llama.cpp's own rounding: FROM.gguf TO.gguf FILE_TYPE."""

import ctypes
import json
import sys

import llama_cpp

parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.allow_requantize, parameters.nthread = int(sys.argv[3]), True, 2
status = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters))
assert status == 0, f"llama_model_quantize: {status}"
print(json.dumps({"status": status}))
