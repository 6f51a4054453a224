// Runs a bundle with nothing of TVM but its runtime: libtvm_runtime.so and libtvm_ffi.so.
//
//     run BUNDLE INPUT=ARRAY.npy ...
//
// prints one line per output, its task and then its values with all their digits, and how long one inference took.
// docs/raspberry-pi.md says how to build it. It uses the C interface of TVM, so any C++ compiler and library will do.
#include <tvm/ffi/c_api.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

// A value of TVM's: an integer, a string, a tensor, an array, a map, a module, a function.
class Value {
 public:
  Value() = default;
  Value(int64_t number) { any_.type_index = kTVMFFIInt, any_.v_int64 = number; }
  Value(const std::string& text) {
    const TVMFFIByteArray bytes{text.data(), text.size()};
    Check(TVMFFIStringFromByteArray(&bytes, &any_));
  }
  Value(const char* text) : Value(std::string(text)) {}
  Value(DLDevice device) { any_.type_index = kTVMFFIDevice, any_.v_device = device; }
  Value(const Value& other) : any_(other.any_) {
    if (IsObject()) TVMFFIObjectIncRef(any_.v_obj);
  }
  Value(Value&& other) noexcept : any_(other.any_) { other.any_ = TVMFFIAny{}; }
  Value& operator=(Value other) { return std::swap(any_, other.any_), *this; }
  ~Value() {
    if (IsObject()) TVMFFIObjectDecRef(any_.v_obj);
  }

  static Value Global(const char* name) {
    Value function;
    const TVMFFIByteArray bytes{name, std::char_traits<char>::length(name)};
    Check(TVMFFIFunctionGetGlobal(&bytes, reinterpret_cast<TVMFFIObjectHandle*>(&function.any_.v_obj)));
    if (function.any_.v_obj == nullptr) throw std::runtime_error(std::string(name) + ": not in this TVM runtime");
    function.any_.type_index = kTVMFFIFunction;
    return function;
  }

  Value Call(const std::vector<Value>& arguments) const {
    Value result;
    auto* first = const_cast<TVMFFIAny*>(reinterpret_cast<const TVMFFIAny*>(arguments.data()));
    Check(TVMFFIFunctionCall(any_.v_obj, first, static_cast<int32_t>(arguments.size()), &result.any_));
    return result;
  }

  int64_t Length() const { return Global("ffi.ArraySize").Call({*this}).any_.v_int64; }
  Value operator[](int64_t n) const { return Global("ffi.ArrayGetItem").Call({*this, n}); }
  Value operator[](const char* key) const { return Global("ffi.MapGetItem").Call({*this, key}); }
  Value Method(const char* name) const { return Global("ffi.ModuleGetFunction").Call({*this, name, 1}); }

  std::string Text() const {
    const auto bytes = any_.type_index == kTVMFFISmallStr ? TVMFFISmallBytesGetContentByteArray(&any_)
                                                          : *TVMFFIBytesGetByteArrayPtr(any_.v_obj);
    return {bytes.data, bytes.size};
  }
  DLTensor& Tensor() const { return *TVMFFITensorGetDLTensorPtr(any_.v_obj); }

 private:
  bool IsObject() const { return any_.type_index >= kTVMFFIStaticObjectBegin; }

  static void Check(int code) {
    if (code == 0) return;
    Value error;
    TVMFFIErrorMoveFromRaised(reinterpret_cast<TVMFFIObjectHandle*>(&error.any_.v_obj));
    error.any_.type_index = kTVMFFIError;
    const TVMFFIByteArray message = TVMFFIErrorGetCellPtr(error.any_.v_obj)->message;
    throw std::runtime_error(std::string(message.data, message.size));
  }

  TVMFFIAny any_{};
};

static_assert(sizeof(Value) == sizeof(TVMFFIAny), "arguments are handed over as they lie in memory");

std::string Read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": can't be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

size_t Elements(const DLTensor& tensor) {
  size_t count = 1;
  for (int axis = 0; axis < tensor.ndim; ++axis) count *= static_cast<size_t>(tensor.shape[axis]);
  return count;
}

// Makes the tensor of an input from a .npy file that holds exactly its shape and dtype.
Value Load(const Value& input, const std::string& path) {
  const DLDevice cpu{kDLCPU, 0};
  Value tensor = Value::Global("runtime.TVMTensorAllocWithScope").Call({input["shape"], input["dtype"], cpu, Value()});
  const DLTensor& where = tensor.Tensor();
  const size_t bytes = Elements(where) * where.dtype.bits / 8;
  const std::string file = Read(path);
  if (file.size() < 10 || file.compare(1, 5, "NUMPY") != 0) throw std::runtime_error(path + ": not a .npy file");
  const size_t header = 10 + static_cast<unsigned char>(file[8]) + 256 * static_cast<unsigned char>(file[9]);
  if (file.size() != header + bytes) throw std::runtime_error(path + ": not of the input's shape and dtype");
  file.copy(static_cast<char*>(where.data), bytes, header);
  return tensor;
}

template <typename T>
void Print(const DLTensor& tensor, const char* format) {
  for (size_t i = 0; i < Elements(tensor); ++i) std::printf(format, static_cast<const T*>(tensor.data)[i]);
}

void Run(const std::string& bundle, const std::map<std::string, std::string>& files) {
  const Value manifest = Value::Global("ffi.json.Parse").Call({Read(bundle + "/manifest.json")});
  const Value library = Value::Global("ffi.ModuleLoadFromFile").Call({bundle + "/lib.so"});
  const Value machine = library.Method("vm_load_executable").Call({});
  const int64_t cpu = kDLCPU, first = 0, pooled_allocator = 2, fastest_cores = 1;
  machine.Method("vm_initialization").Call({cpu, first, pooled_allocator});
  Value::Global("runtime.config_threadpool").Call({fastest_cores, manifest["threads"]});

  std::vector<Value> arguments;
  const Value inputs = manifest["inputs"], outputs = manifest["outputs"];
  for (int64_t n = 0; n < inputs.Length(); ++n) {
    const std::string name = inputs[n]["name"].Text();
    if (files.count(name) == 0) throw std::runtime_error(name + ": missing; give " + name + "=ARRAY.npy");
    arguments.push_back(Load(inputs[n], files.at(name)));
  }
  const Value network = machine.Method("main");
  network.Call(arguments);  // the first call makes threads and buffers
  const auto started = std::chrono::steady_clock::now();
  const Value answers = network.Call(arguments);
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - started;

  for (int64_t n = 0; n < answers.Length(); ++n) {
    const Value answer = answers[n];
    const std::string dtype = outputs[n]["dtype"].Text();
    std::printf("%s", outputs[n]["task"].Text().c_str());
    if (dtype == "float32") Print<float>(answer.Tensor(), " %.9g");
    else if (dtype == "int64") Print<long long>(answer.Tensor(), " %lld");
    else if (dtype == "int32") Print<int>(answer.Tensor(), " %d");
    else std::printf(" values of %s", dtype.c_str());
    std::printf("\n");
  }
  std::fprintf(stderr, "%.3f ms\n", took.count());
}

int main(int count, char** words) try {
  if (count < 2) throw std::runtime_error("usage: run BUNDLE INPUT=ARRAY.npy ...");
  std::map<std::string, std::string> files;
  for (int n = 2; n < count; ++n) {
    const std::string word = words[n];
    const size_t equals = word.find('=');
    if (equals == std::string::npos) throw std::runtime_error(word + ": write it as INPUT=ARRAY.npy");
    files[word.substr(0, equals)] = word.substr(equals + 1);
  }
  Run(words[1], files);
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
