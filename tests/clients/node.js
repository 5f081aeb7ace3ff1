// @grpc/grpc-js with the protos as they are: a unary call, a server stream, a bidirectional stream, a deadline, an error.
//
// usage: node node.js ADDRESS PROTO_DIR
'use strict';

const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const [address, protos] = process.argv.slice(2);
const options = { includeDirs: [protos], keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };
const definition = loader.loadSync(['introspect/v1/capture.proto', 'introspect/v1/model.proto'].map((p) => path.join(protos, p)), options);
const v1 = grpc.loadPackageDefinition(definition).introspect.v1;
const credentials = grpc.credentials.createInsecure();
const captures = new v1.CaptureService(address, credentials);
const models = new v1.ModelService(address, credentials);

const text = 'The plot is thin, but the acting is a delight.';
const request = (hooks, model = 'sentiment') => ({ model, input: { text: { text } }, selection: { hooks } });

let failed = 0;
async function check(name, body) {
  try {
    const told = await body();
    console.log(`ok      grpc-js: ${name}${told ? ` (${told})` : ''}`);
  } catch (error) {
    failed = 1;
    console.log(`FAILED  grpc-js: ${name}\n${error.stack}`);
  }
}

function expect(holds, what) {
  if (!holds) throw new Error(what);
}

/** Messages of a stream, and the error that ended it, if one did. */
function drained(call) {
  return new Promise((resolve) => {
    const messages = [];
    call.on('data', (message) => messages.push(message));
    call.on('error', (error) => resolve({ messages, error }));
    call.on('end', () => resolve({ messages, error: null }));
  });
}

/** Puts the messages of an answer together: tensors by name, and the summary. */
function whole(messages) {
  const tensors = new Map();
  let bytes = 0;
  for (const message of messages) {
    if (message.item !== 'tensor') continue;
    const { name, shape, data } = message.tensor;
    bytes += data.length;
    const before = tensors.get(name) ?? { shape, parts: [] };
    before.parts.push(data);
    tensors.set(name, before);
  }
  const { summary } = messages.at(-1);
  expect(summary, 'the summary comes last');
  expect(summary.messages === messages.length - 1 && summary.bytes === bytes, 'the summary counts what came');
  const floats = new Map();
  for (const [name, { shape, parts }] of tensors) {
    const all = Buffer.concat(parts);
    const values = new Float32Array(all.buffer.slice(all.byteOffset, all.byteOffset + all.length));
    expect(values.length === shape.reduce((a, b) => a * b, 1), `${name} is whole`);
    floats.set(name, { shape, values });
  }
  return floats;
}

async function main() {
  await check('unary: ListModels', async () => {
    const answer = await new Promise((resolve, reject) => {
      models.ListModels({}, (error, value) => (error ? reject(error) : resolve(value)));
    });
    const states = answer.models.map((m) => `${m.name} ${m.state}`).join();
    expect(states === 'bert MODEL_STATE_READY,gpt2 MODEL_STATE_READY,sentiment MODEL_STATE_READY', states);
  });

  await check('server stream: Capture', async () => {
    const { messages, error } = await drained(captures.Capture(request(['attentions.*'])));
    expect(!error, error);
    const { shape, values } = whole(messages).get('blocks.0.attn.hook_pattern');
    const keys = shape.at(-1);
    for (let row = 0; row < values.length; row += keys) {
      const sum = values.subarray(row, row + keys).reduce((a, b) => a + b, 0);
      expect(Math.abs(sum - 1) < 1e-5, `row ${row} sums to ${sum}`);
    }
    return `${messages.length} messages`;
  });

  await check('bidirectional stream: CaptureStream answers in order', async () => {
    const call = captures.CaptureStream();
    const ended = drained(call);
    const ids = Array.from({ length: 20 }, (_, i) => `row-${i}`);
    for (const id of ids) call.write({ id, request: request(['hidden_states.0']) });
    call.end();
    const { messages, error } = await ended;
    expect(!error, error);
    const done = messages.filter((m) => m.capture?.item === 'summary').map((m) => m.id);
    expect(done.join() === ids.join(), done.join());
    const { summary } = messages.at(-1);
    expect(summary.answered === 20 && summary.failed === 0, JSON.stringify(summary));
  });

  await check('a deadline ends a stream that stays open', async () => {
    const begun = Date.now();
    const call = captures.CaptureStream(new grpc.Metadata(), { deadline: begun + 500 });
    const ended = drained(call);
    call.write({ id: 'a', request: request(['pattern']) });
    const { messages, error } = await ended;
    expect(error?.code === grpc.status.DEADLINE_EXCEEDED, `${error}`);
    expect(messages.length > 0, 'what was asked for came before');
    const took = Date.now() - begun;
    expect(took > 400 && took < 1500, `${took} ms`);
  });

  await check('an error has its code, its text and details', async () => {
    const { error } = await drained(captures.Capture(request(['no_such_point'])));
    expect(error?.code === grpc.status.INVALID_ARGUMENT, `${error}`);
    expect(error.metadata.get('grpc-status-details-bin').length === 1, 'google.rpc details come in the trailers');
    return error.details;
  });

  captures.close();
  models.close();
  process.exit(failed);
}

main();
