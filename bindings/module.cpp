#include <pybind11/pybind11.h>

#include <cstring>
#include <iterator>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../src/cpu/checks.h"
#include "../src/cpu/dispatch.h"

namespace py = pybind11;
using namespace fastattn;

// torch's dtypes and their codes, from `set_dtypes`; the references are kept for good.
static std::vector<std::pair<PyObject*, int>> dtypes;

// A value that a field cannot hold: fields and kernels are named where it is caught.
struct Refusal {
  PyObject* type;
  std::string rule;
};

static std::string text(PyObject* x) { return py::repr(x).cast<std::string>(); }
static py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
static int64_t integer(PyObject* value) {
  const long long x = PyLong_AsLongLong(value);
  if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}
static double number(PyObject* value) {
  const double x = PyFloat_AsDouble(value);
  if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

// The kernel's view of a torch.Tensor of at most 4 dimensions.
static Tensor view_of(PyObject* tensor) {
  static PyObject *data_ptr = PyUnicode_InternFromString("data_ptr"), *shape = PyUnicode_InternFromString("shape"),
                  *stride = PyUnicode_InternFromString("stride"), *dtype = PyUnicode_InternFromString("dtype");
  const py::object sizes = checked(PyObject_GetAttr(tensor, shape));
  const py::object strides = checked(PyObject_CallMethodNoArgs(tensor, stride));
  const py::object type = checked(PyObject_GetAttr(tensor, dtype));
  const py::object address = checked(PyObject_CallMethodNoArgs(tensor, data_ptr));
  const Py_ssize_t n = PyTuple_Size(sizes.ptr());
  if (n > 4 || PyTuple_Size(strides.ptr()) != n)
    throw Refusal{PyExc_ValueError, "must have at most 4 dimensions, each with a stride"};
  Tensor t;
  t.data = PyLong_AsVoidPtr(address.ptr());
  int code = -1;
  for (const auto& [known, its] : dtypes)
    if (known == type.ptr()) code = its;
  if (code < 0) throw Refusal{PyExc_TypeError, "must have a dtype that kernels take, given " + text(type.ptr())};
  t.dtype = static_cast<DType>(code);
  for (Py_ssize_t i = 0; i < n; i++) {
    t.size[4 - n + i] = integer(PyTuple_GET_ITEM(sizes.ptr(), i));
    t.stride[4 - n + i] = integer(PyTuple_GET_ITEM(strides.ptr(), i));
  }
  return t;
}

enum class Kind { tensor, number, int32, int64 };
template <class T>
constexpr Kind kind_of = Kind::tensor;
template <>
constexpr Kind kind_of<double> = Kind::number;
template <>
constexpr Kind kind_of<int32_t> = Kind::int32;
template <>
constexpr Kind kind_of<int64_t> = Kind::int64;

struct Field {
  PyObject* name;  // interned
  Kind kind;
  size_t offset;    // bytes from the struct's begin
  PyObject* unset;  // what it holds then
};

static void set(char* params, const Field& field, PyObject* value) {
  void* to = params + field.offset;
  if (field.kind == Kind::tensor) {
    *(Tensor*)to = view_of(value);
  } else if (field.kind == Kind::number) {
    *(double*)to = number(value);
  } else {
    const int64_t x = integer(value);
    if (field.kind == Kind::int64)
      *(int64_t*)to = x;
    else if (x == (int32_t)x)
      *(int32_t*)to = (int32_t)x;
    else
      throw Refusal{PyExc_ValueError, "must fit in 32 bits, given " + std::to_string(x)};
  }
}

class Kernel {
 public:
  const char* name;
  void (*run)(const Kernel&, PyObject*);  // with a dict of fields

  template <class Params>
  Kernel(const char* name, void (*run)(const Kernel&, PyObject*), Params params)
      : name(name), run(run), indices_(PyDict_New()) {
    params.fields([&](const char* names, const auto&... field) { (add(names, &params, field), ...); });
  }

  // The fields' names and what they hold when they are not set, None for a tensor.
  py::dict fields() const {
    py::dict result;
    for (const Field& field : fields_) result[py::handle(field.name)] = py::handle(field.unset);
    return result;
  }

  // None leaves a field as it is.
  void fill(void* params, PyObject* values) const {
    PyObject *key, *value;
    for (Py_ssize_t i = 0; PyDict_Next(values, &i, &key, &value);) {
      PyObject* index = PyDict_GetItemWithError(indices_, key);
      if (!index) throw py::type_error("fastattn." + std::string(name) + " has no field " + text(key));
      if (value == Py_None) continue;
      const Field& field = fields_[PyLong_AsSize_t(index)];
      try {
        set((char*)params, field, value);
      } catch (const Refusal& refusal) {
        refuse(field, refusal);
      } catch (const py::error_already_set& error) {
        const char* of = field.kind == Kind::tensor   ? "a tensor"
                         : field.kind == Kind::number ? "a number"
                                                      : "an integer";
        if (error.matches(PyExc_TypeError) || error.matches(PyExc_AttributeError))
          refuse(field, {PyExc_TypeError, std::string("must be ") + of + ", given " + text((PyObject*)Py_TYPE(value))});
        if (error.matches(PyExc_OverflowError)) refuse(field, {PyExc_ValueError, "must fit in 64 bits"});
        throw;
      }
    }
  }

 private:
  PyObject* indices_;  // of the fields, by name; kept for good
  std::vector<Field> fields_;

  // The field that `names` begins with, which is moved past it.
  template <class Params, class T>
  void add(const char*& names, const Params* params, const T& field) {
    const size_t length = std::strcspn(names, ",");
    PyObject* field_name = PyUnicode_FromStringAndSize(names, Py_ssize_t(length));
    PyUnicode_InternInPlace(&field_name);
    PyDict_SetItem(indices_, field_name, py::int_(fields_.size()).ptr());
    py::object unset = py::none();
    if constexpr (std::is_arithmetic_v<T>) unset = py::cast(field);
    fields_.push_back(
        {field_name, kind_of<T>, size_t((const char*)&field - (const char*)params), unset.release().ptr()});
    names += length + std::strspn(names + length, ", ");
  }
  [[noreturn]] void refuse(const Field& field, const Refusal& refusal) const {
    PyErr_Format(refusal.type, "fastattn.%s: %U %s", name, field.name, refusal.rule.c_str());
    throw py::error_already_set();
  }
};

template <class Params, void (*KernelTable::*kernel)(const Params&)>
static void run(const Kernel& of, PyObject* fields) {
  Params params;
  of.fill(&params, fields);
  check(of.name, params);
  py::gil_scoped_release release;
  (cpu::kernels().*kernel)(params);
}

static std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all = {
#define KERNEL(name, Params) Kernel(#name, run<Params, &KernelTable::name>, Params{}),
#include "../src/cpu/kernels.def"
#undef KERNEL
  };
  return all;
}

// run(name, /, **fields), a plain function: a call is one lookup of a kernel and one of each field. The fields are the
// caller's until it returns, and keep their tensors alive.
static PyObject* run_kernel(PyObject*, PyObject* args, PyObject* fields) {
  static PyObject* indices = [] {
    PyObject* dict = PyDict_New();
    for (const Kernel& k : kernels()) PyDict_SetItemString(dict, k.name, py::int_(&k - kernels().data()).ptr());
    return dict;
  }();
  static PyObject* none = PyDict_New();
  try {
    if (PyTuple_GET_SIZE(args) != 1) throw py::type_error("run takes a kernel's name and its fields by name");
    PyObject* index = PyDict_GetItemWithError(indices, PyTuple_GET_ITEM(args, 0));
    if (!index) throw py::type_error("fastattn has no kernel " + text(PyTuple_GET_ITEM(args, 0)));
    const Kernel& kernel = kernels()[PyLong_AsSize_t(index)];
    kernel.run(kernel, fields ? fields : none);
    Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PYBIND11_MODULE(_core, m) {
  m.doc() = "fastattn's compiled kernels. Torch-free: they take addresses, sizes and strides in elements.";
  m.def("cpu_isas", [] {
    const char* names[8];
    const int n = cpu::runnable(names, 8);
    py::tuple result(n);
    for (int i = 0; i < n; i++) result[i] = py::str(names[i]);
    return result;
  });
  m.def("cpu_isa", [] { return cpu::kernels().isa; });
  m.def("select_cpu_isa", [](const char* name) { return cpu::select(name); });
  m.def("set_dtypes", [](const py::dict& codes) {
    dtypes.clear();
    for (const auto& [dtype, code] : codes) dtypes.emplace_back(dtype.inc_ref().ptr(), code.cast<int>());
  });
  py::dict fields;  // of each kernel's parameters
  for (const Kernel& kernel : kernels()) fields[kernel.name] = kernel.fields();
  m.attr("fields") = fields;
  py::module_ limits = m.def_submodule("limits", "What the kernels can hold.");
#define LIMIT(name, value) limits.attr(#name) = value;
  FASTATTN_LIMITS
#undef LIMIT
  py::tuple score_ops(std::size(kScoreOps));  // names, in the order of their codes
  for (size_t i = 0; i < std::size(kScoreOps); i++) score_ops[i] = py::str(kScoreOps[i].name);
  m.attr("score_ops") = score_ops;

  static PyMethodDef run = {"run", (PyCFunction)(void (*)(void))run_kernel, METH_VARARGS | METH_KEYWORDS,
                            "run(kernel, /, **fields): tensors by reference, None left absent."};
  m.attr("run") = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&run, nullptr, nullptr));
}
