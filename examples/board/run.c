// Runs a bundle with nothing of TVM but its runtime: libtvm_runtime.so and libtvm_ffi.so.
//
//     run BUNDLE INPUT=ARRAY.npy ...
//
// prints one line per output, its task and then its values with all their digits, and how long one inference took.
// docs/raspberry-pi.md says how to build it. It uses the C interface of TVM, so any C compiler will do.
#define _POSIX_C_SOURCE 200112L
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <tvm/ffi/c_api.h>

// A value of TVM's: an integer, a string, a tensor, an array, a map, a module, a function. All live as long as this
// program, so nothing is given back.
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

// Makes the tensor of an input from a .npy file that holds exactly its shape and dtype.
static Value load(Value input, const char* path) {
  const Value cpu = {.type_index = kTVMFFIDevice, .v_device = {kDLCPU, 0}}, none = {.type_index = kTVMFFINone};
  const Value tensor =
      CALL(global("runtime.TVMTensorAllocWithScope"), field(input, "shape"), field(input, "dtype"), cpu, none);
  const DLTensor* where = HELD(DLTensor, tensor);
  const size_t bytes = elements(where) * where->dtype.bits / 8;
  size_t size;
  const char* file = read_file(path, &size);
  if (size < 10 || memcmp(file + 1, "NUMPY", 5) != 0) fail("%s: not a .npy file", path);
  const size_t header = 10 + (unsigned char)file[8] + 256 * (size_t)(unsigned char)file[9];
  if (size != header + bytes) fail("%s: not of the input's shape and dtype", path);
  memcpy(where->data, file + header, bytes);
  return tensor;
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
  const int64_t threads = field(manifest, "threads").v_int64;
  // Else TVM makes a pool for all cores, whose workers spin.
  if (threads == 1) setenv("TVM_NUM_THREADS", "1", 1);
  else CALL(global("runtime.config_threadpool"), number(fastest_cores), number(threads));

  const Value inputs = field(manifest, "inputs"), outputs = field(manifest, "outputs");
  const size_t taken = (size_t)length(inputs);
  Value* arguments = calloc(taken + 1, sizeof(Value));
  if (arguments == NULL) fail("out of memory");
  for (size_t n = 0; n < taken; ++n) {
    const Value input = item(inputs, (int64_t)n);
    arguments[n] = load(input, file_of(string(field(input, "name")), words + 2, count - 2));
  }
  const Value network = method(machine, "main");
  call(network, arguments, taken);  // the first call makes threads and buffers
  struct timespec began, ended;
  clock_gettime(CLOCK_MONOTONIC, &began);
  const Value answers = call(network, arguments, taken);
  clock_gettime(CLOCK_MONOTONIC, &ended);

  for (int64_t n = 0; n < length(answers); ++n) {
    const Value answer = item(answers, n), output = item(outputs, n);
    print(string(field(output, "task")), string(field(output, "dtype")), HELD(DLTensor, answer));
  }
  fprintf(stderr, "%.3f ms\n", (ended.tv_sec - began.tv_sec) * 1e3 + (ended.tv_nsec - began.tv_nsec) / 1e6);
}
