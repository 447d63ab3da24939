// An order service in Node that evaluates the flag over OFREP for every order.
//
//   npm install
//   OFREP_ENDPOINT=http://127.0.0.1:8080 OFREP_KEY=oms_… npm start
//   curl -X POST http://127.0.0.1:3000/orders
import { createServer } from 'node:http';
import { OpenFeature } from '@openfeature/server-sdk';
import { OFREPProvider } from '@openfeature/ofrep-provider';

const { OFREP_ENDPOINT = 'http://127.0.0.1:8080', OFREP_KEY = '', TENANT, PORT = '3000' } = process.env;

await OpenFeature.setProviderAndWait(
  new OFREPProvider({ baseUrl: OFREP_ENDPOINT, headers: [['X-API-Key', OFREP_KEY]] }),
);
const flags = OpenFeature.getClient();
const context = TENANT ? { tenant: TENANT } : {};

const server = createServer(async (request, response) => {
  if (request.method !== 'POST' || request.url !== '/orders') {
    response.writeHead(404).end();
    return;
  }
  // false is what this shop does where the server has no value or cannot be reached
  const decision = await flags.getBooleanDetails('external_oms_enabled', false, context);
  const owner = decision.value ? 'external' : 'ours';
  response.writeHead(201, { 'content-type': 'application/json' });
  response.end(JSON.stringify({ owner, variant: decision.variant, why: decision.errorMessage ?? decision.reason }));
});

server.listen(Number(PORT), '127.0.0.1', () => console.log(`http://127.0.0.1:${server.address().port}/orders`));
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => server.close(() => process.exit(0)));
