// dcmjs-dimse as a peer: `MODULES scu PORT REQUESTS FOLDER` asks and prints one JSON array, `MODULES scp PORT FOLDER
// DESTINATIONS` serves.
'use strict';

const path = require('path');

const [modules, mode, port, ...rest] = process.argv.slice(2);
const dimse = require(path.join(modules, 'dcmjs-dimse'));

dimse.log.setLevel('silent');
const { Client, Dataset, Server, Scp, constants, requests, responses } = dimse;
const { PresentationContextResult, SopClass, Status, StorageClass, TransferSyntax } = constants;
const PLAIN = [TransferSyntax.ExplicitVRLittleEndian, TransferSyntax.ImplicitVRLittleEndian];

// What is sent on one association; each request is {verb, ...}.
function send(port, calling, called, asked, folder) {
  return new Promise((resolve, reject) => {
    const client = new Client();
    const told = [];
    for (const one of asked) {
      const request = made(one);
      request.on('response', (response) => told.push(described(one.verb, response)));
      client.addRequest(request);
    }
    client.on('cStoreRequest', (request, callback) => {
      keep(request, folder);
      const response = responses.CStoreResponse.fromRequest(request);
      response.setStatus(Status.Success);
      callback(response);
    });
    client.on('associationRejected', (result) => reject(new Error(`rejected ${JSON.stringify(result)}`)));
    client.on('networkError', reject);
    client.on('closed', () => resolve(told));
    client.send('127.0.0.1', port, calling, called);
  });
}

function made(one) {
  switch (one.verb) {
    case 'echo':
      return new requests.CEchoRequest();
    case 'store':
      return new requests.CStoreRequest(one.file);
    case 'find':
      return requests.CFindRequest.createStudyFindRequest(one.keys);
    case 'move':
      return requests.CMoveRequest.createStudyMoveRequest(one.destination, one.study);
    case 'get':
      return requests.CGetRequest.createStudyGetRequest(one.study);
    default:
      throw new Error(`no verb ${one.verb}`);
  }
}

function described(verb, response) {
  const found = { verb, status: response.getStatus() };
  if (verb === 'find' && response.hasDataset()) found.elements = response.getDataset().getElements();
  if (verb === 'move' || verb === 'get') {
    found.completed = response.getCompleted();
    found.failed = response.getFailures();
  }
  return found;
}

const held = new Map(); // data sets of the server by SOP Instance UID

function keep(request, folder) {
  const dataset = request.getDataset();
  held.set(dataset.getElement('SOPInstanceUID'), dataset);
  dataset.toFile(path.join(folder, `${dataset.getElement('SOPInstanceUID')}.dcm`));
}

function ofStudy(request) {
  const study = request.getDataset().getElement('StudyInstanceUID');
  return [...held.values()].filter((dataset) => !study || dataset.getElement('StudyInstanceUID') === study);
}

function counted(kind, request, status, completed, remaining) {
  const response = kind.fromRequest(request);
  response.setStatus(status);
  response.setCompleted(completed);
  response.setRemaining(remaining);
  response.setFailures(0);
  response.setWarnings(0);
  return response;
}

class Peer extends Scp {
  associationRequested(association) {
    this.association = association;
    for (const { id } of association.getPresentationContexts()) {
      const context = association.getPresentationContext(id);
      const syntax = context.getTransferSyntaxUids().find((uid) => PLAIN.includes(uid));
      if (syntax) context.setResult(PresentationContextResult.Accept, syntax);
      else context.setResult(PresentationContextResult.RejectTransferSyntaxesNotSupported);
    }
    this.sendAssociationAccept();
  }

  cEchoRequest(request, callback) {
    const response = responses.CEchoResponse.fromRequest(request);
    response.setStatus(Status.Success);
    callback(response);
  }

  cStoreRequest(request, callback) {
    keep(request, Peer.folder);
    const response = responses.CStoreResponse.fromRequest(request);
    response.setStatus(Status.Success);
    callback(response);
  }

  cFindRequest(request, callback) {
    const keys = Object.keys(request.getDataset().getElements()).filter((name) => /^[A-Z]\w+$/.test(name));
    const byStudy = new Map(ofStudy(request).map((dataset) => [dataset.getElement('StudyInstanceUID'), dataset]));
    const found = [...byStudy.values()].map((dataset) => {
      const response = responses.CFindResponse.fromRequest(request);
      response.setStatus(Status.Pending);
      response.setDataset(
        new Dataset({
          ...Object.fromEntries(keys.map((name) => [name, dataset.getElement(name) ?? ''])),
          QueryRetrieveLevel: 'STUDY',
        })
      );
      return response;
    });
    const last = responses.CFindResponse.fromRequest(request);
    last.setStatus(Status.Success);
    callback([...found, last]);
  }

  cMoveRequest(request, callback) {
    const files = ofStudy(request);
    const stores = files.map((dataset) => new requests.CStoreRequest(dataset));
    const client = new Client();
    stores.forEach((store) => client.addRequest(store));
    client.on('closed', () => callback([counted(responses.CMoveResponse, request, Status.Success, files.length, 0)]));
    client.send('127.0.0.1', Peer.destinations[request.getCommandDataset().getElement('MoveDestination')], 'DCMJS', 'SPHERE');
  }

  cGetRequest(request, callback) {
    const stores = ofStudy(request).map((dataset) => new requests.CStoreRequest(dataset));
    let done = 0;
    for (const store of stores) {
      store.on('response', () => {
        done += 1;
        const left = stores.length - done;
        if (left) this.sendResponse(request, counted(responses.CGetResponse, request, Status.Pending, done, left));
        else callback([counted(responses.CGetResponse, request, Status.Success, done, 0)]);
      });
    }
    this.sendRequests(stores);
  }

  associationReleaseRequested() {
    this.sendAssociationReleaseResponse();
  }
}

if (mode === 'scu') {
  send(Number(port), 'DCMJS', 'SPHERE', JSON.parse(rest[0]), rest[1]).then(
    (told) => console.log(JSON.stringify(told)),
    (error) => {
      console.error(String(error));
      process.exitCode = 1;
    }
  );
} else {
  [Peer.folder] = rest;
  Peer.destinations = JSON.parse(rest[1]);
  new Server(Peer).listen({ port: Number(port), host: '127.0.0.1' });
}
