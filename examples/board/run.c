// Runs a bundle with nothing of TVM but its runtime: libtvm_runtime.so and libtvm_ffi.so.
//
//     run BUNDLE INPUT=ARRAY.npy ...
//
// prints one line per output, its task and then its values with all their digits, and how long one inference took.
// Arrays with one axis more than the inputs have are several inferences, one after the other; each begins with the
// states that the one before left. What has one value only has it in all of them.
// docs/raspberry-pi.md says how to build it. It uses the C interface of TVM, so any C compiler will do.
#define _POSIX_C_SOURCE 200112L
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <tvm/ffi/c_api.h>

// A value of TVM's: an integer, a string, a tensor, an array, a map, a module, a function. What comes once lives as long
// as this program; what comes with every call is given back.
typedef TVMFFIAny Value;

#define COUNT(array) (sizeof(array) / sizeof *(array))
// What an object of TVM's holds follows its header.
#define HELD(type, value) ((type*)((char*)(value).v_obj + sizeof(TVMFFIObject)))

static void fail(const char* format, ...) {
  va_list words;
  va_start(words, format);
  fputs("error: ", stderr);
  vfprintf(stderr, format, words);
  fputc('\n', stderr);
  exit(2);
}

static void check(int code) {
  if (code == 0) return;
  Value error = {.type_index = kTVMFFIError};
  TVMFFIErrorMoveFromRaised((TVMFFIObjectHandle*)&error.v_obj);
  const TVMFFIByteArray message = HELD(TVMFFIErrorCell, error)->message;
  fail("%.*s", (int)message.size, message.data);
}

static void give_back(Value object) { check(TVMFFIObjectDecRef(object.v_obj)); }

static Value number(int64_t value) { return (Value){.type_index = kTVMFFIInt, .v_int64 = value}; }

static Value text(const char* value) { return (Value){.type_index = kTVMFFIRawStr, .v_c_str = value}; }

static Value call(Value function, const Value* arguments, size_t count) {
  Value result = {.type_index = kTVMFFINone};
  check(TVMFFIFunctionCall(function.v_obj, (Value*)arguments, (int32_t)count, &result));
  return result;
}

#define CALL(function, ...) call(function, (Value[]){__VA_ARGS__}, COUNT(((Value[]){__VA_ARGS__})))

static Value global(const char* name) {
  Value function = {.type_index = kTVMFFIFunction};
  const TVMFFIByteArray bytes = {name, strlen(name)};
  check(TVMFFIFunctionGetGlobal(&bytes, (TVMFFIObjectHandle*)&function.v_obj));
  if (function.v_obj == NULL) fail("%s: not in this TVM runtime", name);
  return function;
}

static int64_t length(Value array) { return CALL(global("ffi.ArraySize"), array).v_int64; }
static Value item(Value array, int64_t n) { return CALL(global("ffi.ArrayGetItem"), array, number(n)); }
static Value field(Value map, const char* key) { return CALL(global("ffi.MapGetItem"), map, text(key)); }
static Value method(Value module, const char* name) {
  return CALL(global("ffi.ModuleGetFunction"), module, text(name), number(1));
}

static char* copied(const char* data, size_t size) {
  char* copy = calloc(size + 1, 1);
  if (copy == NULL) fail("out of memory");
  memcpy(copy, data, size);
  return copy;
}

static char* string(Value value) {
  if (value.type_index == kTVMFFISmallStr) return copied(value.v_bytes, value.small_str_len);
  return copied(HELD(TVMFFIByteArray, value)->data, HELD(TVMFFIByteArray, value)->size);
}

static char* joined(const char* one, const char* other) {
  char* both = calloc(strlen(one) + strlen(other) + 1, 1);
  if (both == NULL) fail("out of memory");
  return strcat(strcpy(both, one), other);
}

// Returns the bytes of a file, and one zero behind them.
static char* read_file(const char* path, size_t* size) {
  FILE* file = fopen(path, "rb");
  if (file == NULL) fail("%s: can't be read", path);
  char* bytes = NULL;
  *size = 0;
  for (size_t space = 1 << 16, got = 1; got > 0; *size += got, space *= 2) {
    bytes = realloc(bytes, *size + space + 1);
    if (bytes == NULL) fail("%s: out of memory", path);
    got = fread(bytes + *size, 1, space, file);
  }
  if (ferror(file)) fail("%s: can't be read", path);
  fclose(file);
  bytes[*size] = '\0';
  return bytes;
}

static size_t elements(const DLTensor* tensor) {
  size_t count = 1;
  for (int axis = 0; axis < tensor->ndim; ++axis) count *= (size_t)tensor->shape[axis];
  return count;
}

static size_t bytes_of(Value tensor) {
  const DLTensor* held = HELD(DLTensor, tensor);
  return elements(held) * held->dtype.bits / 8;
}

// Makes a tensor of zeros of the shape and dtype of an input or a state.
static Value zeros(Value input) {
  const Value cpu = {.type_index = kTVMFFIDevice, .v_device = {kDLCPU, 0}}, none = {.type_index = kTVMFFINone};
  const Value tensor =
      CALL(global("runtime.TVMTensorAllocWithScope"), field(input, "shape"), field(input, "dtype"), cpu, none);
  memset(HELD(DLTensor, tensor)->data, 0, bytes_of(tensor));
  return tensor;
}

// Returns the values in a .npy file: of one or several calls of an input.
static const char* load(Value input, const char* path, size_t* calls) {
  const size_t bytes = bytes_of(input);
  size_t size;
  const char* file = read_file(path, &size);
  if (size < 10 || memcmp(file + 1, "NUMPY", 5) != 0) fail("%s: not a .npy file", path);
  const size_t header = 10 + (unsigned char)file[8] + 256 * (size_t)(unsigned char)file[9];
  *calls = bytes == 0 ? 0 : (size - header) / bytes;
  if (*calls == 0 || size != header + *calls * bytes) fail("%s: not of the input's shape and dtype", path);
  return file + header;
}

// Returns a file in memory that is the file's own.
static char* mapped(const char* path, size_t* size) {
  const int file = open(path, O_RDONLY);
  struct stat about;
  if (file < 0 || fstat(file, &about) != 0) fail("%s: can't be read", path);
  *size = (size_t)about.st_size;
  char* bytes = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, file, 0);
  if (bytes == MAP_FAILED) fail("%s: can't be read", path);
  close(file);
  return bytes;
}

// Makes a tensor of an array in memory that lives as long as this program.
static Value tensor_of(char* bytes, Value shape, Value dtype) {
  DLManagedTensor* managed = calloc(1, sizeof *managed);
  int64_t* axes = calloc((size_t)length(shape) + 1, sizeof *axes);
  if (managed == NULL || axes == NULL) fail("out of memory");
  for (int64_t axis = 0; axis < length(shape); ++axis) axes[axis] = item(shape, axis).v_int64;
  managed->dl_tensor = (DLTensor){.data = bytes, .device = {kDLCPU, 0}, .ndim = (int32_t)length(shape), .shape = axes};
  const char* name = string(dtype);
  const TVMFFIByteArray chars = {name, strlen(name)};
  check(TVMFFIDataTypeFromString(&chars, &managed->dl_tensor.dtype));
  Value tensor = {.type_index = kTVMFFITensor};
  check(TVMFFITensorFromDLPack(managed, 0, 0, (TVMFFIObjectHandle*)&tensor.v_obj));
  return tensor;
}

// Gives a network its weights: arrays in a file, one behind the other, each from the next multiple of 64 bytes on.
static void load_weights(Value machine, Value weights, const char* path) {
  const Value parts[] = {field(weights, "kept"), field(weights, "spread")};
  const size_t count = (size_t)(length(parts[0]) + length(parts[1]));
  if (count == 0) return;
  Value* tensors = calloc(count, sizeof(Value));
  if (tensors == NULL) fail("out of memory");
  size_t size, end = 0, n = 0;
  char* bytes = mapped(path, &size);
  for (size_t part = 0; part < COUNT(parts); ++part)
    for (int64_t k = 0; k < length(parts[part]); ++k, ++n) {
      const Value record = item(parts[part], k);
      const size_t begin = (end + 63) / 64 * 64;
      tensors[n] = tensor_of(bytes + begin, item(record, 0), item(record, 1));
      end = begin + bytes_of(tensors[n]);
      if (end > size) fail("%s: damaged, it is too short; copy the bundle again", path);
    }
  if (end != size) fail("%s: damaged, it is too long; copy the bundle again", path);
  give_back(call(method(machine, "nnfuze_weights"), tensors, count));
  for (n = 0; n < count; ++n) give_back(tensors[n]);
}

static void print(const char* task, const char* dtype, const DLTensor* tensor) {
  printf("%s", task);
  const size_t count = elements(tensor);
  if (strcmp(dtype, "float32") == 0)
    for (size_t n = 0; n < count; ++n) printf(" %.9g", ((const float*)tensor->data)[n]);
  else if (strcmp(dtype, "int64") == 0)
    for (size_t n = 0; n < count; ++n) printf(" %lld", (long long)((const int64_t*)tensor->data)[n]);
  else if (strcmp(dtype, "int32") == 0)
    for (size_t n = 0; n < count; ++n) printf(" %d", ((const int32_t*)tensor->data)[n]);
  else
    printf(" values of %s", dtype);
  printf("\n");
}

// Returns what INPUT=FILE among the words says of an input.
static const char* file_of(const char* name, char** words, int count) {
  for (int n = 0; n < count; ++n) {
    const char* equals = strchr(words[n], '=');
    if (strncmp(words[n], name, strlen(name)) == 0 && equals == words[n] + strlen(name)) return equals + 1;
  }
  fail("%s: missing; give %s=ARRAY.npy", name, name);
  return NULL;
}

int main(int count, char** words) {
  if (count < 2) fail("usage: run BUNDLE INPUT=ARRAY.npy ...");
  for (int n = 2; n < count; ++n)
    if (strchr(words[n], '=') == NULL) fail("%s: write it as INPUT=ARRAY.npy", words[n]);
  size_t size;
  const Value manifest = CALL(global("ffi.json.Parse"), text(read_file(joined(words[1], "/manifest.json"), &size)));
  const Value library = CALL(global("ffi.ModuleLoadFromFile"), text(joined(words[1], "/lib.so")));
  const Value machine = call(method(library, "vm_load_executable"), NULL, 0);
  const int64_t first = 0, pooled_allocator = 2, fastest_cores = 1;
  CALL(method(machine, "vm_initialization"), number(kDLCPU), number(first), number(pooled_allocator));
  load_weights(machine, field(manifest, "weights"), joined(words[1], "/weights.bin"));
  const int64_t threads = field(manifest, "threads").v_int64;
  // Else workers spin for a tenth of a second, and TVM makes a pool for all cores.
  setenv("TVM_THREAD_POOL_SPIN_COUNT", "4000", 0);
  if (threads == 1) setenv("TVM_NUM_THREADS", "1", 1);
  else CALL(global("runtime.config_threadpool"), number(fastest_cores), number(threads));

  const Value inputs = field(manifest, "inputs"), outputs = field(manifest, "outputs");
  const Value states = field(manifest, "states");
  const size_t taken = (size_t)length(inputs), given = (size_t)length(outputs), kept = (size_t)length(states);
  Value* arguments = calloc(taken + kept + 1, sizeof(Value));
  const char** values = calloc(taken + 1, sizeof(char*));
  if (arguments == NULL || values == NULL) fail("out of memory");
  size_t* held = calloc(taken + 1, sizeof(size_t));
  if (held == NULL) fail("out of memory");
  size_t calls = 1;
  for (size_t n = 0; n < taken; ++n) {
    const Value input = item(inputs, (int64_t)n);
    const char* name = string(field(input, "name"));
    arguments[n] = zeros(input);
    values[n] = load(arguments[n], file_of(name, words + 2, count - 2), &held[n]);
    if (held[n] > 1 && calls > 1 && held[n] != calls)
      fail("%s: %zu inferences, but %zu of another input", name, held[n], calls);
    if (held[n] > 1) calls = held[n];
    memcpy(HELD(DLTensor, arguments[n])->data, values[n], bytes_of(arguments[n]));
  }
  for (size_t n = 0; n < kept; ++n) arguments[taken + n] = zeros(item(states, (int64_t)n));
  const char** labels = calloc(2 * given + 1, sizeof(char*));
  if (labels == NULL) fail("out of memory");
  for (size_t n = 0; n < given; ++n) {
    const Value output = item(outputs, (int64_t)n);
    labels[2 * n] = string(field(output, "task"));
    labels[2 * n + 1] = string(field(output, "dtype"));
  }
  const Value network = method(machine, "main");
  give_back(call(network, arguments, taken + kept));  // the first call makes threads and buffers
  struct timespec began, ended;
  for (size_t step = 0; step < calls; ++step) {
    for (size_t n = 0; n < taken; ++n) {
      const size_t bytes = bytes_of(arguments[n]);
      if (held[n] > 1) memcpy(HELD(DLTensor, arguments[n])->data, values[n] + step * bytes, bytes);
    }
    clock_gettime(CLOCK_MONOTONIC, &began);
    const Value answers = call(network, arguments, taken + kept);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    for (size_t n = 0; n < given; ++n) {
      const Value answer = item(answers, (int64_t)n);
      print(labels[2 * n], labels[2 * n + 1], HELD(DLTensor, answer));
      give_back(answer);
    }
    for (size_t n = 0; n < kept; ++n) {
      give_back(arguments[taken + n]);
      arguments[taken + n] = item(answers, (int64_t)(given + n));
    }
    give_back(answers);
  }
  fprintf(stderr, "%.3f ms\n", (ended.tv_sec - began.tv_sec) * 1e3 + (ended.tv_nsec - began.tv_nsec) / 1e6);
}
