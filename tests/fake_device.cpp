// A device type cuda (two of them) or mps in a CPU build of torch: its tensors lie in the host's memory, the CPU's kernels compute.
// One fallback for all operations checks devices as CUDA does, lends the CPU the tensors, and gives what comes back its device.
// Compiled with -DFAKE=CUDA or -DFAKE=MPS by fake_device.py.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <set>
using namespace at;
using std::string;

constexpr auto TYPE = DeviceType::FAKE;
constexpr auto KEY = c10::DispatchKey::FAKE;
constexpr bool IS_MPS = TYPE == DeviceType::MPS;
constexpr int COUNT = IS_MPS ? 1 : 2;
static thread_local int current = 0, computing = -1; // the device that is set; the one whose operation is under way
static int placed(Device d) { return d.has_index() ? d.index() : current; }

// ---- memory: the CPU's allocator, which counts for a device what its operations allocate, and refuses what is above a limit
static std::atomic<int64_t> used[COUNT], peak[COUNT], limit[COUNT];
struct Counting final : c10::Allocator {
  struct Header { int64_t bytes; int device; }; // in front of the memory, which stays aligned to 64 bytes
  static Header* header(void* data) { return (Header*)((char*)data - 64); }
  static c10::Allocator* plain() {
    static auto found = c10::GetDefaultCPUAllocator();
    return found;
  }
  static void release(void* data) {
    if (!data) return;
    if (header(data)->device >= 0) used[header(data)->device] -= header(data)->bytes;
    plain()->raw_deallocate(header(data));
  }
  c10::DataPtr allocate(size_t n) override {
    if (!n) return {nullptr, kCPU};
    if (computing >= 0) count(n);
    void* data = (char*)plain()->raw_allocate(n + 64) + 64;
    *header(data) = {int64_t(n), computing};
    return {data, data, release, kCPU};
  }
  static void count(int64_t n) {
    int64_t now = used[computing] += n, most = limit[computing];
    if (most && now > most) used[computing] -= n;
    TORCH_CHECK_WITH(OutOfMemoryError, !most || now <= most, "CUDA out of memory. Tried to allocate ", n, " bytes.");
    peak[computing] = std::max(peak[computing].load(), now);
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

// ---- generators: the CPU's, on the device
struct FakeGenerator : CPUGeneratorImpl {
  FakeGenerator(int i) : CPUGeneratorImpl(default_rng_seed_val) { device_ = Device(TYPE, i); key_set_ = c10::DispatchKeySet(KEY); }
};
static Generator& default_generator(int i) {
  static std::vector<Generator> all{make_generator<FakeGenerator>(0), make_generator<FakeGenerator>(1)};
  return all[i < 0 ? current : i];
}

// ---- tensors: the same storage under another key and device
struct Placed : c10::TensorImpl {
  Placed(const Tensor& t, c10::DispatchKey key, Device d) : TensorImpl(c10::Storage(t.storage()), c10::DispatchKeySet(key), t.dtype()) {
    device_opt_ = d;
  }
  static void place(c10::TensorImpl* t, Device d) { ((Placed*)t)->device_opt_ = d; }
};
static Tensor seen(const Tensor& t, c10::DispatchKey key, Device d) {
  auto x = at::detail::make_tensor<Placed>(t, key, d);
  auto* impl = x.unsafeGetTensorImpl();
  impl->set_storage_offset(t.storage_offset());
  impl->set_sizes_and_strides(t.sizes(), t.strides());
  if (t.is_conj()) impl->_set_conj(true);
  if (t.is_neg()) impl->_set_neg(true);
  return x;
}
static bool is_fake(const Tensor& t) { return t.defined() && t.device().type() == TYPE; }
static bool same_view(const Tensor& a, const Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides() && a.storage_offset() == b.storage_offset();
}

using Change = std::function<Tensor(const Tensor&)>;
static c10::List<Tensor> changed(const std::vector<Tensor>& tensors, const Change& f) {
  c10::List<Tensor> out;
  for (const auto& t : tensors) out.push_back(t.defined() ? f(t) : t);
  return out;
}
static c10::IValue changed(const c10::IValue& v, const Change& f) { // all tensors of an argument, in lists and lists of lists
  if (v.isTensor()) return v.toTensor().defined() ? f(v.toTensor()) : v;
  if (v.isTensorList()) return changed(v.toTensorVector(), f);
  if (!v.isList()) return v;
  auto type = v.toList().elementType()->str();
  if (type == "Tensor?") {
    c10::List<std::optional<Tensor>> out;
    for (const c10::IValue& e : v.toListRef()) {
      bool none = e.isNone() || !e.toTensor().defined(); // a slice beside indices is an undefined tensor
      out.push_back(none ? std::optional<Tensor>() : f(e.toTensor()));
    }
    return out;
  }
  if (type == "Tensor[]") {
    c10::List<c10::List<Tensor>> out;
    for (const c10::IValue& e : v.toListRef()) out.push_back(changed(e.toTensorVector(), f));
    return out;
  }
  return v;
}

// ---- operations
static const std::set<string> ACROSS{"aten::copy_", "aten::set_"}; // these take tensors of several devices
static const std::set<string> INDEX{"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}; // or indices on the CPU
struct Computing { // inside, device `i` computes
  int before = computing;
  Computing(int i) { computing = i; }
  ~Computing() { computing = before; }
};

static void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto& arguments = schema.arguments();
  auto given = stack->end() - arguments.size();
  bool across = ACROSS.count(name);

  int device = -1;
  bool shapes = false; // tensors that are only shapes, which torch makes to see what an operation would give
  for (size_t i = 0; i < arguments.size(); ++i) changed(given[i], [&](const Tensor& t) { shapes |= t.is_meta(); return t; });
  if (shapes) return op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), stack);

  auto clash = [&](const Tensor& t) {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", Device(TYPE, device), " and ",
                t.device(), "! (", name, ")");
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    changed(given[i], [&](const Tensor& t) {
      if (!is_fake(t)) return t;
      if (device >= 0 && t.device().index() != device && !across) clash(t);
      if (device < 0) device = t.device().index();
      return t;
    });
    if (device < 0 && given[i].isDevice()) device = placed(given[i].toDevice());
  }
  if (device < 0) device = current;
  TORCH_CHECK(device < COUNT, "CUDA error: invalid device ordinal");

  Generator own, lent;
  std::vector<std::pair<Tensor, Tensor>> pairs; // of the device, and as the CPU sees it
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& v = given[i];
    bool written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    bool index = INDEX.count(name) && i > 0;
    v = changed(v, [&](const Tensor& t) {
      if (!is_fake(t)) { // a number may come from the CPU
        bool number = t.device().is_cpu() && t.dim() == 0 && !written;
        if (!across && !number && !(index && t.device().is_cpu())) clash(t);
        return t;
      }
      for (auto& [ours, cpu] : pairs) if (ours.is_same(t)) return cpu;
      pairs.emplace_back(t, seen(t, c10::DispatchKey::CPU, kCPU));
      return pairs.back().second;
    });
    if (v.isDevice()) v = Device(kCPU);
    if (arguments[i].name() == "pin_memory") v = c10::IValue();
    if (arguments[i].name() != "generator") continue;
    own = v.isGenerator() ? v.toGenerator() : default_generator(device);
    TORCH_CHECK(own.device() == Device(TYPE, device), "Expected a '", Device(TYPE, device), "' device type for generator but found '",
                own.device(), "'");
    lent = at::detail::createCPUGenerator();
    lent.set_state(own.get_state());
    v = lent;
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard plain(c10::autocast_dispatch_keyset);
    Computing here(device);
    op.callBoxed(stack);
  }
  if (lent.defined()) own.set_state(lent.get_state());
  for (auto& [ours, cpu] : pairs) { // what was resized, or got another storage
    auto* impl = ours.unsafeGetTensorImpl();
    if (!cpu.storage().is_alias_of(ours.storage())) {
      impl->set_storage_keep_dtype(cpu.storage());
      Placed::place(impl, Device(TYPE, device));
    }
    if (same_view(ours, cpu)) continue;
    impl->set_storage_offset(cpu.storage_offset());
    impl->set_sizes_and_strides(cpu.sizes(), cpu.strides());
  }
  auto back = [&](const Tensor& x) {
    for (auto& [ours, cpu] : pairs) if (cpu.is_same(x)) return ours;
    if (across) return x;
    bool wide = x.scalar_type() == kDouble || x.scalar_type() == kComplexDouble;
    TORCH_CHECK_TYPE(!(IS_MPS && wide), "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                     "Please use float32 instead. (", name, ")");
    return seen(x, KEY, Device(TYPE, device));
  };
  for (auto v = stack->end() - schema.returns().size(); v != stack->end(); ++v) *v = changed(*v, back);
}

static auto boxed() { return torch::CppFunction::makeFromBoxedFunction<&fallback>(); }
TORCH_LIBRARY_IMPL(_, FAKE, m) { m.fallback(boxed()); }
TORCH_LIBRARY_IMPL(aten, FAKE, m) { // these would ask for kernels of CUDA's or Apple's, or the storage for its device
  for (auto name : {"copy_", "set_", "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "convolution",
                    "convolution_backward", "_unsafe_view", "alias", "detach"}) m.impl(name, boxed());
}
static Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout, bool causal,
                     std::optional<double> scale, bool grouped) {
  return std::get<0>(at::_scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, {}, scale, grouped));
}
TORCH_LIBRARY_IMPL(aten, FAKE, m) { m.impl("scaled_dot_product_attention", attend); } // else it looks for a fused kernel
TORCH_LIBRARY_IMPL(aten, AUTOGRAD, m) { m.impl("scaled_dot_product_attention", attend); }
TORCH_LIBRARY_IMPL(c10d, FAKE, m) { // gloo serves as NCCL does
  for (auto name : {"allreduce_", "broadcast_", "allgather_", "_allgather_base_", "_reduce_scatter_base_", "barrier"}) m.impl(name, boxed());
}

// ---- what else torch asks of a device
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return TYPE; }
  Device getDevice() const override { return Device(TYPE, current); }
  void setDevice(Device d) const override { current = placed(d); }
  void uncheckedSetDevice(Device d) const noexcept override { current = placed(d); }
  Device exchangeDevice(Device d) const override {
    Device old = getDevice();
    setDevice(d);
    return old;
  }
  c10::Stream getStream(Device d) const override { return c10::Stream(c10::Stream::DEFAULT, Device(TYPE, placed(d))); }
  c10::Stream getDefaultStream(Device d) const override { return getStream(d); }
  c10::Stream getNewStream(Device d, int) const override { return getStream(d); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return getStream(s.device()); }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  DeviceIndex deviceCount() const noexcept override { return COUNT; }
};
C10_REGISTER_GUARD_IMPL(FAKE, Guard)

template <class Base> struct Hooks : Base {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return COUNT; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex i) const override { current = i; }
  DeviceIndex exchangeDevice(DeviceIndex i) const override { return std::exchange(current, i); }
  DeviceIndex maybeExchangeDevice(DeviceIndex i) const override { return std::exchange(current, i); }
  const Generator& getDefaultGenerator(DeviceIndex i) const override { return default_generator(i); }
  Generator getNewGenerator(DeviceIndex i) const override { return make_generator<FakeGenerator>(i < 0 ? current : i); }
};
struct CudaHooks final : Hooks<CUDAHooksInterface> {
  bool hasCUDA() const override { return true; }
  DeviceIndex current_device() const override { return current; }
  int getNumGPUs() const override { return COUNT; }
};
struct MpsHooks final : Hooks<MPSHooksInterface> {
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
};
struct Start {
  Start() {
    static Counting counting;
    c10::SetCPUAllocator(&counting, 100);
    if (IS_MPS) new ((void*)&at::detail::getMPSHooks()) MpsHooks; // torch has made its own already; they hold no data
    else new ((void*)&at::detail::getCUDAHooks()) CudaHooks;
  }
} start;

TORCH_LIBRARY(fake_device, m) { m.def("generator(int i) -> Generator?", [](int64_t i) { return default_generator(i); }); }
extern "C" {
  int fake_count() { return COUNT; }
  int fake_current() { return current; }
  int fake_exchange(int i) { return i < 0 ? current : std::exchange(current, i); }
  int64_t fake_used(int i) { return used[i]; }
  int64_t fake_peak(int i) { return peak[i]; }
  void fake_reset_peak(int i) { peak[i] = used[i].load(); }
  void fake_limit(int i, int64_t bytes) { limit[i] = bytes; }
}
