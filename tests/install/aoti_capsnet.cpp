// A CapsNet without Python: loads fastcaps' compiled ops and an AOTInductor package and runs it on images from a file.
//
//   aoti_capsnet extension.so model.pt2 cpu|cuda B C H W images.raw lengths.raw
//
// images.raw: float32 [B, C, H, W]; lengths.raw, written: the first output, float32.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

int main(int count, char** arguments) {
  if (count != 10) {
    std::fprintf(stderr, "usage: %s extension.so model.pt2 cpu|cuda B C H W images.raw lengths.raw\n", arguments[0]);
    return 2;
  }
  // The ops register themselves; what of Python the file names is bound when it is called, which it never is here.
  if (!dlopen(arguments[1], RTLD_LAZY | RTLD_GLOBAL)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  std::vector<int64_t> shape;
  for (int n = 4; n < 8; ++n) shape.push_back(std::stoll(arguments[n]));
  at::Tensor images = at::empty(shape);
  std::ifstream(arguments[8], std::ios::binary).read(static_cast<char*>(images.data_ptr()), images.nbytes());
  const std::vector<at::Tensor> outputs = model.run({images.to(at::Device(arguments[3]))});
  const at::Tensor lengths = outputs.at(0).cpu().contiguous();
  std::ofstream(arguments[9], std::ios::binary).write(static_cast<const char*>(lengths.data_ptr()), lengths.nbytes());
}
