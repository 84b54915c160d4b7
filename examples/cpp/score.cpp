// SPDX-License-Identifier: BSD-3-Clause
// Scores texts by a model that was exported from Python, in a program without Python.
//
//   score /path/to/masked_loss_ext/_C.abi3.so model.pt2 LONGEST FILE...
//
// Prints of each file's first LONGEST bytes how many bits one costs. The files are one padded batch;
// what is padding, the loss in the model neither reads nor counts.

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: %s _C.abi3.so model.pt2 LONGEST FILE FILE...\n", argv[0]);
    return 2;
  }
  // Before the model is loaded, which asks for the operators by name.
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "score: %s\n", dlerror());
    return 1;
  }
  const int64_t most = std::atol(argv[3]);
  std::vector<std::string> texts;
  int64_t longest = 0;
  for (int i = 4; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(file), {}};
    text.resize(std::min<int64_t>(static_cast<int64_t>(text.size()), most));
    longest = std::max<int64_t>(longest, static_cast<int64_t>(text.size()));
    texts.push_back(std::move(text));
  }
  const int64_t rows = static_cast<int64_t>(texts.size());
  at::Tensor tokens = at::zeros({rows, longest}, at::kLong);
  at::Tensor mask = at::zeros({rows, longest}, at::kBool);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t* place = tokens[row].data_ptr<int64_t>();
    for (const char c : texts[row]) *place++ = static_cast<unsigned char>(c);
    mask[row].narrow(0, 0, static_cast<int64_t>(texts[row].size())).fill_(true);
  }

  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const at::Tensor nats = model.run({tokens, mask})[0];  // [rows, longest]
  for (int64_t row = 0; row < rows; ++row) {
    const double counted = static_cast<double>(texts[row].size()) - 1;  // nothing predicts the first
    const double bits = nats[row].sum().item<double>() / counted / std::log(2.0);
    std::printf("%.6f %s\n", bits, argv[4 + row]);
  }
}
