// What llama.cpp makes of a GGUF file: node llama_cpp.mjs PACKAGE < {"file", "texts", "prompts", "tokens"}
// Tokens of the texts, the flags of the tokenizer, and the tokens that greedy decoding adds to each prompt.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { getLlama } = await import(pathToFileURL(`${process.argv[2]}/dist/index.js`));
const { file, texts, prompts, tokens } = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, logLevel: "error", build: "never", maxThreads: 1, progressLogs: false });
const model = await llama.loadModel({ modelPath: file });
const answer = {
    begins: model.tokens.shouldPrependBosToken,
    ends: model.tokens.shouldAppendEosToken,
    texts: texts.map((text) => Array.from(model.tokenize(text, true))),
    prompts: [],
};
if (prompts.length > 0) {
    const context = await model.createContext({ contextSize: 128, threads: 1 });
    for (const prompt of prompts) {
        const sequence = context.getSequence();
        const added = [];
        for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
            added.push(token);
            if (added.length === tokens) break;
        }
        answer.prompts.push(added);
        sequence.dispose();
    }
}
console.log(JSON.stringify(answer));
process.exit(0);
