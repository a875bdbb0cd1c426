// Registration only: hands the FFI handlers to Python and says what they were built for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bench.h"
#include "isa.h"
#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* specmoe_chunked_attention(XLA_FFI_CallFrame*);
XLA_FFI_Error* specmoe_expert_ffn(XLA_FFI_CallFrame*);
XLA_FFI_Error* specmoe_packed_expert_ffn(XLA_FFI_CallFrame*);
XLA_FFI_Error* specmoe_rowwise_expert_ffn(XLA_FFI_CallFrame*);
XLA_FFI_Error* specmoe_expert_ffn_table(XLA_FFI_CallFrame*);
XLA_FFI_Error* specmoe_few_rows_products(XLA_FFI_CallFrame*);
XLA_FFI_Error* specmoe_packed_few_rows_products(XLA_FFI_CallFrame*);
XLA_FFI_Error* specmoe_put_rows(XLA_FFI_CallFrame*);
}

namespace py = pybind11;

PYBIND11_MODULE(_cpu_ops, m) {
  m.attr("ffi_api") = py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def("isas", &specmoe::isa_names);
  m.def("handlers", []() {
    py::dict d;
    d["specmoe_chunked_attention"] = py::capsule(reinterpret_cast<void*>(&specmoe_chunked_attention));
    d["specmoe_expert_ffn"] = py::capsule(reinterpret_cast<void*>(&specmoe_expert_ffn));
    d["specmoe_packed_expert_ffn"] = py::capsule(reinterpret_cast<void*>(&specmoe_packed_expert_ffn));
    d["specmoe_rowwise_expert_ffn"] = py::capsule(reinterpret_cast<void*>(&specmoe_rowwise_expert_ffn));
    d["specmoe_expert_ffn_table"] = py::capsule(reinterpret_cast<void*>(&specmoe_expert_ffn_table));
    d["specmoe_few_rows_products"] = py::capsule(reinterpret_cast<void*>(&specmoe_few_rows_products));
    d["specmoe_packed_few_rows_products"] = py::capsule(reinterpret_cast<void*>(&specmoe_packed_few_rows_products));
    d["specmoe_put_rows"] = py::capsule(reinterpret_cast<void*>(&specmoe_put_rows));
    return d;
  });
  m.def("read_bandwidth", &specmoe::read_bandwidth, py::arg("isa"), py::arg("bytes"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("fma_peak", &specmoe::fma_peak, py::arg("isa"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}
