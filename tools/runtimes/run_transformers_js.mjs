// transformers.js: logits of folders of `compress export --to onnx`, or an encoder's hidden states, and ids of its tokenizer.
// node run_transformers_js.mjs ASKED.json FOLDER OUT.json [FOLDER OUT.json …]   (NODE_MODULES: folder with the package)
import { createRequire } from "node:module";
import { readFileSync, writeFileSync } from "node:fs";
import { dirname, basename, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(process.env.NODE_MODULES + "/");
const js = await import(pathToFileURL(require.resolve("@huggingface/transformers")));
const [source, ...pairs] = process.argv.slice(2);
const asked = JSON.parse(readFileSync(source));
js.env.allowRemoteModels = false;
const values = (list) => new js.Tensor("int64", BigInt64Array.from(list, BigInt), [1, list.length]);
const auto = asked.causal ? js.AutoModelForCausalLM : js.AutoModel;

async function outputs(folder, target) {
  js.env.localModelPath = dirname(resolve(folder)) + "/";
  const name = basename(resolve(folder));
  const tokenizer = await js.AutoTokenizer.from_pretrained(name);
  const model = await auto.from_pretrained(name);
  const inputs = { input_ids: values(asked.ids), attention_mask: values(asked.ids.map(() => 1)) };
  if (!asked.causal) inputs.token_type_ids = values(asked.ids.map(() => 0));
  const result = await model(inputs);
  const logits = result.logits ?? result.last_hidden_state;
  writeFileSync(target + ".f32", Buffer.from(new Float32Array(logits.data).buffer));
  await model.dispose();
  return { shape: logits.dims, text_ids: tokenizer.encode(asked.text, { add_special_tokens: false }), version: js.env.version };
}

for (let place = 0; place < pairs.length; place += 2) {
  const answer = await outputs(pairs[place], pairs[place + 1]).catch((error) => ({ error: String(error) }));
  writeFileSync(pairs[place + 1], JSON.stringify(answer));
}
